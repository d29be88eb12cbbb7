"""What options may be: the closed choices and limits that the library checks and the command line lists.

Light to import, so that `--help` need not wait for numpy or PyTorch. Engines are no closed choice: they are the rows of
`backends/registry.py`.
"""

from __future__ import annotations

from typing import Literal

# Of a model: see `ModelConfig`.
Ibn = Literal["none", "a"]
StemPool = Literal["padded", "ceil"]
GlobalStride = Literal[1, 2]
Pooling = Literal["max", "avg", "gem"]
Neck = Literal["relu", "linear", "relu_norm"]

# Whose code wrote a public checkpoint; "auto": the names of its tensors tell.
SourceName = Literal["auto", "fastreid", "seathiefwang", "levyfan", "gnayuohz"]

# Where a run trains; "auto": on CUDA where PyTorch finds a device.
Device = Literal["auto", "cpu", "cuda"]

# Of a bundle's graph.
Precision = Literal["fp32", "fp16", "bf16", "int8"]

# What decodes images; nvimagecodec: NVIDIA's, on a GPU.
Decoder = Literal["pillow", "nvimagecodec"]

MAX_SEED = 2**63 - 1  # PyTorch's

# Images a call of an engine: beyond, activations take more memory than GPUs have.
MAX_BATCH = 4096
MAX_THREADS = 1024

# Of a store's embeddings.
Dtype = Literal["float32", "float16"]

Metric = Literal["cosine", "euclidean"]

# In which the products of embeddings are computed; sums are float32's in all of them.
Compute = Literal["float32", "tf32", "float16"]

# Of the images that a multiple query stands for.
QueryPooling = Literal["avg", "max"]

# Points that an engine's rank-1 and mAP may differ from the reference's.
DEFAULT_TOLERANCE = 0.5

# Between images that are grouped.
ClusterDistance = Literal["jaccard", "cosine"]

# Of an index for approximate search; auto: milvus where the target is one, else by the number of rows.
BuiltIndexKind = Literal["flat", "hnsw", "ivf-pq", "milvus"]
IndexKind = Literal["auto", "flat", "hnsw", "ivf-pq", "milvus"]

# Of embeddings to two dimensions.
Projection = Literal["pca", "umap"]

# Of `--data KIND:DIR`: `folder` is any in Market-1501's layout, without published sizes; `identities` one a person.
DATA_KINDS = ("market1501", "dukemtmc", "cuhk03-labeled", "cuhk03-detected", "msmt17", "folder", "identities")

API_KEY = "MGN_DEPLOY_API_KEY"  # in the environment: what callers of a service show
VERIFY_KEY = "MGN_DEPLOY_VERIFY_KEY"  # in the environment: the public key that has to have signed every bundle
