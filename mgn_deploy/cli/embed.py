"""`mgn-deploy embed`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mgn_deploy.choices import MAX_BATCH, MAX_THREADS, Decoder, Dtype
from mgn_deploy.cli.options import AllowUnproven, Backend, BoxClass, BoxesFile, Json, MinScore, Video, out
from mgn_deploy.console import percent, print_json, print_table, progress, say
from mgn_deploy.errors import UserError

if TYPE_CHECKING:
    from mgn_deploy.gallery.cluster_connection import Cluster
    from mgn_deploy.gallery.profile import Profile
    from mgn_deploy.gallery.run import GalleryReport


def embed(
    store: Annotated[Path, out("The embedding store to write or to go on with.")],
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="A folder of images, searched recursively; images, tar shards, folders and patterns ('a/*.jpg'); the "
            "same as s3://, gs:// or http:// URLs; or a list: a path a line, or a .csv, .tsv or .parquet with a column "
            "path ('-': stdin)."
        ),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="The bundle that embeds; with --server the one that it must run.")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Embed by http://HOST:PORT (mgn-deploy serve) or grpc://HOST:PORT (Triton)."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Embed on a Ray cluster: ray://HOST:PORT, auto (this machine's) or local."
        ),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(metavar="MIN:MAX", help="Engines on the cluster; by default from 1 to its GPUs or nodes."),
    ] = None,
    backend: Backend = "auto",
    batch: Annotated[
        str,
        typer.Option("--batch", metavar="N|auto", help="Images a call of the engine; auto: the fastest of several."),
    ] = "8",
    threads: Annotated[
        str | None,
        typer.Option("--threads", metavar="N|auto", help="That decode images; by default one more than CPUs."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the stored embeddings.")] = "float32",
    labels: Annotated[
        str | None,
        typer.Option(
            help="Who is on an image: none, market1501 (0002_c1... is person 2, camera 1), folder (the first folder of "
            "its path), track (of a tracker's boxes), or a table with the columns path, identity and camera, as a list "
            "may be itself."
        ),
    ] = None,
    boxes: BoxesFile = None,
    video: Video = None,
    box_class: BoxClass = ["person"],  # noqa: B006
    min_score: MinScore = 0.0,
    tracks: Annotated[
        Path | None,
        typer.Option("--pool-tracks", help="Also write a store with one embedding a track, as `store pool-tracks`."),
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(help="The folder or URL that names begin at, where a list or several images are given."),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="N/OF", help="Only one part of the images, as in 3/16; `store merge` joins.")
    ] = None,
    verify_content: Annotated[
        bool, typer.Option("--verify-content", help="Read known images too, and embed those whose bytes have changed.")
    ] = False,
    decoder: Annotated[
        Decoder,
        typer.Option(help="Of photos; nvimagecodec: on a GPU, proven on the first images before any is embedded."),
    ] = "pillow",
    max_failures: Annotated[
        int | None, typer.Option(min=0, help="Stop after more unreadable images than this.")
    ] = None,
    allow_unproven: AllowUnproven = False,
    profile: Annotated[bool, typer.Option("--profile", help="Tell where the time goes, and what to change.")] = False,
    json: Json = False,
) -> None:
    """Embed images into a store.

    Run again, it goes on where it stopped, and embeds what is new or has changed.
    """
    from mgn_deploy.gallery.inputs import open_inputs
    from mgn_deploy.gallery.manifest import read_manifest
    from mgn_deploy.gallery.tracks import pool_tracks

    batch_size = _number("--batch", batch, MAX_BATCH)
    decoding = None if threads is None else _number("--threads", threads, MAX_THREADS)
    of_one_process = profile or decoding is not None or decoder != "pillow"
    engines = _cluster(cluster, workers, batch_size, server, of_one_process)
    source = open_inputs(
        images or [], root=root, boxes=boxes, classes=box_class, min_score=min_score, video=video, part=shard
    )
    run = _run_of(server, bundle, engines, backend, allow_unproven)
    try:
        with progress() as update:
            report = run(
                source,
                store,
                batch_size=batch_size,
                dtype=dtype,
                labels=labels,
                verify_content=verify_content,
                max_failures=max_failures,
                progress=update,
                **({"profile": True} if profile else {}),
                **({"threads": decoding} if decoding is not None else {}),
                **({"decoder": decoder} if decoder != "pillow" else {}),
            )
    except KeyboardInterrupt:
        say(f"interrupted: what was embedded is in {store}, and the same command goes on from there")
        raise
    if report.profile is not None:
        _tell(report.profile)
    made = {}
    if tracks is not None:
        with progress() as update:
            pooled = pool_tracks(store, tracks, progress=update)
        say(f"{tracks}: {pooled.tracks} tracks, of {pooled.taken} of {pooled.images} images")
        made["pooled"] = {"store": str(tracks), **vars(pooled)}
    if json:
        print_json({"store": str(store), **report.to_dict(), "backend": read_manifest(store).backend, **made})
    elif not report.embedded and not report.failed:
        print(f"{store}: nothing to do, all {report.unchanged} images are in it")
    else:
        print(
            f"{store}: {report.embedded} embedded in {report.seconds:.1f} s ({report.images_per_second:.1f} images/s), "
            f"{report.unchanged} already there, {len(report.failed)} failed, {report.skipped.total()} skipped"
        )


def _run_of(
    server: str | None, bundle: Path | None, cluster: Cluster | None, backend: str, allow_unproven: bool
) -> Callable[..., GalleryReport]:
    """What embeds: an engine here, a server, or a cluster."""
    from mgn_deploy.embedder import Embedder
    from mgn_deploy.gallery.embed import embed_folder

    if server is None and bundle is None:
        raise UserError("what embeds the images? give --bundle, or --server")
    if cluster is not None:
        assert bundle is not None  # a cluster is refused beside a server
        from mgn_deploy.gallery.cluster import embed_on_cluster

        return partial(embed_on_cluster, bundle=bundle, cluster=cluster, backend=backend, allow_unproven=allow_unproven)
    if server is not None:
        embedder = Embedder.connect(server, bundle)
    else:
        assert bundle is not None
        embedder = Embedder.open(bundle, backend, allow_unproven=allow_unproven)
    engine = embedder.backend
    say(f"{server or bundle} on {engine.name} {engine.version} ({engine.device}), {embedder.proof}")
    return partial(embed_folder, embedder=embedder)


def _cluster(
    address: str | None, workers: str | None, batch_size: int | str, server: str | None, of_one_process: bool
) -> Cluster | None:
    from mgn_deploy.gallery.cluster_connection import Cluster

    if address is None:
        if workers is not None:
            raise UserError(f"--workers {workers} are a cluster's: give --cluster")
        return None
    for given, option in (
        (server is not None, "--server"),
        (of_one_process, "--profile, --threads or --decoder"),
        (batch_size == "auto", "--batch auto"),
    ):
        if given:
            raise UserError(f"--cluster {address}: {option} is of an engine in one process, leave it out")
    if workers is None:
        return Cluster(address)
    match = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", workers)
    if not match:
        raise typer.BadParameter(
            f"give a number or the least and most, as in 1:8, not {workers!r}", param_hint="'--workers'"
        )
    return Cluster(address, (int(match[1]), int(match[2] or match[1])))


def _number(option: str, given: str, most: int) -> int | Literal["auto"]:
    if given == "auto":
        return "auto"
    try:
        number = int(given)
    except ValueError:
        number = 0
    if not 1 <= number <= most:
        raise typer.BadParameter(f"give auto or a number from 1 to {most}, not {given!r}", param_hint=f"'{option}'")
    return number


def _tell(profile: Profile) -> None:
    """Where a run's time went, to stderr."""
    for title, stages in (
        ("the main loop, which calls the engine", profile.loop()),
        ("the threads that decode beside it, together", profile.threads()),
    ):
        total = sum(stages.values()) or 1.0
        rows = [(stage, f"{value:.2f}", percent(value / total)) for stage, value in stages.items()]
        print_table(["stage", "seconds", "%"], rows, title, stderr=True)
    say(profile.advice)
