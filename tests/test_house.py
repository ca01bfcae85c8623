"""The arrows of the house, as `.github/CONTRIBUTING.md` draws them: they run one way, and no room reaches into
another's private names.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    {"ground"},  # files directly in pipelines/, but for the two below
    {"formats", "blip2", "mgm"},
    {"adapters", "caption", "refine", "train", "evaluate", "sample"},
    {"attribution", "ladder", "overlap"},
    {"report", "preflight"},
    {"cluster"},
    {"serve"},
    {"ray_jobs"},
    {"k8s"},
]
"""A room imports from floors below its own."""
TORCH_ONLY = ["pipelines/blip2", "pipelines/mgm", "pipelines/train/step.py", "serve/engine.py", "serve/sampling.py"]


def _room(module: str) -> str:
    top, *rest = module.split(".")
    if top != "pipelines":
        return top
    name = rest[0] if rest else ""
    return name if name in {"preflight", "cluster"} or (ROOT / "pipelines" / name).is_dir() and name else "ground"


def _imports(file: Path) -> Iterator[tuple[str, str]]:
    """Module and name of every import, wherever it stands; the name is empty where the module is taken whole."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                place = (ROOT / node.module.replace(".", "/")) / alias.name
                whole = place.is_dir() or place.with_suffix(".py").is_file()
                yield (f"{node.module}.{alias.name}", "") if whole else (node.module, alias.name)


def _files() -> list[tuple[Path, str]]:
    """Every file of the package and its room."""
    found = [file for top in ("pipelines", "serve", "ray_jobs", "k8s") for file in sorted((ROOT / top).rglob("*.py"))]
    return [(file, _room(".".join(file.relative_to(ROOT).with_suffix("").parts))) for file in found]


def _ours(module: str) -> bool:
    return module.split(".")[0] in ("pipelines", "serve", "ray_jobs", "k8s")


def test_arrows_run_one_way() -> None:
    height = {room: at for at, floor in enumerate(FLOORS) for room in floor}
    wrong, seen = [], 0
    for file, room in _files():
        for module, name in _imports(file):
            other = _room(module)
            if not _ours(module) or other == room or (module, name) == ("pipelines", "__version__"):
                continue
            seen += 1
            if height[other] >= height[room]:
                wrong.append(f"{file.relative_to(ROOT)} imports {module}")
    assert wrong == []
    assert seen > 300


def test_no_room_uses_anothers_private_names() -> None:
    private = [
        f"{file.relative_to(ROOT)}: {module} {name}"
        for file, room in _files()
        for module, name in _imports(file)
        if _ours(module) and _room(module) != room
        if any(part.startswith("_") and not part.startswith("__") for part in (*module.split("."), name))
    ]
    assert [entry for entry in private if not entry.startswith("k8s/command.py: ray_jobs._options")] == []
    assert private, "`k8s/command.py` is a command, and asks for the options of one"


def test_torch_only_files_know_no_ray() -> None:
    files = [
        file for name in TORCH_ONLY for file in ((ROOT / name).rglob("*.py") if "." not in name else [ROOT / name])
    ]
    assert len(files) > 20
    with_ray = [str(file) for file in files for module, _ in _imports(file) if module.split(".")[0] == "ray"]
    assert with_ray == []
