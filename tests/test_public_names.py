"""What a notebook's user sees of the package: its names, and objects that say what they are."""

from __future__ import annotations

import mgn_deploy
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.embedder import Embedder


def test_dir_lists_the_public_names_only():
    public = ["Bundle", "Embedder", "GateFailed", "Store", "UnreadableImage", "UserError", "__version__"]
    assert dir(mgn_deploy) == public
    assert all(hasattr(mgn_deploy, name) for name in public)


def test_a_bundle_says_its_model_precision_and_proofs(bundle_folder):
    bundle = Bundle.open(bundle_folder)
    proven = ", ".join(bundle.manifest.proofs)
    assert proven
    assert repr(bundle) == f"Bundle('{bundle_folder}', resnet18 MGN 96x32, fp32, proven: {proven})"


def test_a_proof_that_did_not_pass_is_not_called_proven(bundle_folder):
    bundle = Bundle.open(bundle_folder)
    missed = {name: proof.model_copy(update={"passed": False}) for name, proof in bundle.manifest.proofs.items()}
    assert repr(Bundle(bundle.folder, bundle.manifest.model_copy(update={"proofs": missed}))).endswith("proven: none)")


def test_an_embedder_says_its_bundle_and_engine(embedder: Embedder):
    backend = embedder.backend
    expected = f"Embedder({embedder.bundle!r}, by onnxruntime {backend.version} on {backend.device})"
    assert repr(embedder) == expected


def test_an_embedder_without_a_bundle_says_its_input_and_engine(embedder: Embedder):
    alone = Embedder(embedder.backend, embedder.bundle.config)
    assert repr(alone).startswith("Embedder(96x32 crops, by onnxruntime ")


def test_an_embedder_tells_its_engines_proof_in_one_line(bundle_folder):
    bundle = Bundle.open(bundle_folder)
    proof = bundle.manifest.proofs["onnxruntime"]
    told = f"proven: {proof.max_abs_error:.1e} from PyTorch's embeddings at most, on {proof.images} images of"
    assert Embedder.open(bundle, "onnxruntime").proof.startswith(told)
    missed = proof.model_copy(update={"passed": False, "misses": ["worst cosine 0.5"]})
    bundle.manifest.proofs["onnxruntime"] = missed
    assert Embedder.open(bundle, "onnxruntime", allow_unproven=True).proof == "not proven: worst cosine 0.5"
    del bundle.manifest.proofs["onnxruntime"]
    assert Embedder.open(bundle, "onnxruntime", allow_unproven=True).proof == "not proven"
