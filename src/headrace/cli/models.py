"""``headrace models``: what can be served here, and what one model is."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.core.errors import HeadraceError, ModelNotFound


def models(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A folder, a hub name, or bundled.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, for machines.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
    ] = False,
) -> None:
    """List the models on this machine, or describe one: what it is, what it takes, and whether it runs here."""
    if name is None:
        found = local_models()
        if as_json:
            print(json.dumps([asdict(model) for model in found]))
        else:
            _print_list(found)
        return
    described = describe(name, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps(asdict(described)))
    else:
        _print_description(described)


@dataclass(slots=True)
class LocalModel:
    """A checkpoint on this machine: how to name it, its kind as its configuration says, parameters (None: unreadable)."""

    name: str
    kind: str
    parameters: int | None
    bytes: int
    path: str


@dataclass(slots=True)
class Description:
    """What a model is. ``kv_bytes_per_token`` is by dtype; ``problem`` says why it is not supported, None when it is."""

    name: str
    path: str
    kind: str
    architecture: str
    parameters: int
    stored_dtype: str
    context: int | None
    layers: int
    kv_bytes_per_token: dict[str, int] = field(default_factory=dict)
    supported: bool = True
    problem: str | None = None


def local_models() -> list[LocalModel]:
    """The bundled models and the checkpoints in the hub's cache, which no network is asked about."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from headrace.models.checkpoints.hub import BUNDLED, resolve

    found: list[LocalModel] = []
    for name in BUNDLED:
        try:
            found.append(_local(name, resolve(name)))
        except ModelNotFound:
            continue  # an installation without the bundled pair
    try:
        cached = sorted(scan_cache_dir(constants.HF_HUB_CACHE).repos, key=lambda repo: repo.repo_id)
    except CacheNotFound:
        return found
    for repo in cached:
        newest = max(repo.revisions, key=lambda revision: revision.last_modified, default=None)
        if repo.repo_type == "model" and newest is not None and (newest.snapshot_path / "config.json").is_file():
            found.append(_local(repo.repo_id, newest.snapshot_path))
    return found


def _local(name: str, folder: Path) -> LocalModel:
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    try:
        kind = str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "unknown"))
    except (OSError, ValueError, AttributeError):
        kind = "unreadable"
    return LocalModel(name, kind, _count(folder), size, str(folder))


def _count(folder: Path) -> int | None:
    """Parameters by the headers of the weight files, None where they are missing or broken."""
    from headrace.models.checkpoints.checks import read_shapes

    try:
        return sum(math.prod(shape) for shape in read_shapes(folder).values())
    except (HeadraceError, OSError):
        return None


def describe(name: str, *, trust_remote_code: bool = False) -> Description:
    """Read a model's configuration and headers; its weights stay on disk, and nothing is downloaded.

    Raises:
        HeadraceError: it is not on this machine, or its files are broken.
    """
    from headrace.models import families
    from headrace.models.checkpoints import checks as checkpoint
    from headrace.models.checkpoints import support

    folder = _on_this_machine(name)
    config = checkpoint.read_config(folder, trust_remote_code=trust_remote_code)
    text = config.get_text_config(decoder=True)
    shapes = checkpoint.read_shapes(folder)
    described = Description(
        name=name,
        path=str(folder),
        kind=str(config.model_type),
        architecture=", ".join(getattr(config, "architectures", None) or ["unnamed"]),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        stored_dtype=str(getattr(config, "dtype", None) or "unnamed").removeprefix("torch."),
        context=getattr(text, "max_position_embeddings", None),
        layers=getattr(text, "num_hidden_layers", 0),
    )
    try:
        _, served = support.check_supported(config)
        checkpoint.check_tokenizer(folder)
        layers, heads, size = families.kv_shape(served)
        described.kv_bytes_per_token = {"float32": 8 * layers * heads * size, "bfloat16": 4 * layers * heads * size}
    except HeadraceError as error:
        described.supported, described.problem = False, error.message
    return described


def _on_this_machine(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from headrace.models.checkpoints.hub import BUNDLED, resolve

    if name in BUNDLED or Path(name).expanduser().exists() or name.count("/") != 1 or name.startswith(("/", ".", "~")):
        return resolve(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise ModelNotFound(
            f"{name} is neither a folder nor in the hub's cache: check the name, or fetch it with: headrace serve {name}",
            field="model",
        ) from error


def _print_list(found: list[LocalModel]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("model", "kind"):
        table.add_column(title, no_wrap=True)
    for title in ("parameters", "on disk"):
        table.add_column(title, justify="right", no_wrap=True)
    for model in found:
        table.add_row(model.name, model.kind, _short(model.parameters), _size(model.bytes))
    console = Console()
    console.print(table)
    console.print("\nDescribe one with: headrace models NAME. Serve it with: headrace serve NAME.", style="dim")


def _print_description(described: Description) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows: list[tuple[str, Any]] = [
        ("model", described.name),
        ("folder", described.path),
        ("architecture", f"{described.architecture} ({described.kind}), {described.layers} layers"),
        ("parameters", f"{_short(described.parameters)}, stored as {described.stored_dtype}"),
        ("context", f"{described.context} tokens" if described.context else "not stated"),
    ]
    if described.kv_bytes_per_token:
        sizes = ", ".join(f"{_size(count)} in {dtype}" for dtype, count in described.kv_bytes_per_token.items())
        rows.append(("K and V per token", sizes))
    rows.append(("supported", "yes" if described.supported else f"no: {described.problem}"))
    for title, value in rows:
        table.add_row(Text(title, style="dim"), Text(value))
    Console().print(table)


def _short(count: int | None) -> str:
    """A number of parameters as people write it: 8.1M, 1.2B."""
    if count is None:
        return "?"
    for bound, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= bound:
            return f"{count / bound:.3g}{unit}"
    return str(count)


def _size(count: int) -> str:
    """Bytes in binary units."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"
