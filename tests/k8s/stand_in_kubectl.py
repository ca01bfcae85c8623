"""A `kubectl` for tests: it answers from recorded answers and from frames of a play, and keeps what it was told.

It is put on the PATH as a program of that name and knows nothing of captune. Its folder (`STAND_IN`) holds

    answers/            what `get --raw /apis/ray.io` says as apis_ray.io.json, what `get nodes` lists as node.json,
                        and what the user may do as rules.json
    play.json           object -> plays; a play is a list of frames, each {"status", "pods", "events", "logs"}
    state.json          objects that were applied, and the frame that each is at
    told.jsonl          every call with its words and standard input

The first look at a job (a `get` of its kind and pods) sees its first frame, the next look the next one; the last frame
stays. A job that was deleted and is applied again goes on with its next play.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path

HOME = Path(os.environ["STAND_IN"])


def main(words: list[str]) -> int:
    given = sys.stdin.read() if "-" in words else ""
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (HOME / "told.jsonl").open("a") as told:
            told.write(json.dumps({"words": words, "given": given}) + "\n")
        state = json.loads((HOME / "state.json").read_text())
        play = json.loads((HOME / "play.json").read_text())
        words = without(words, "--context", "--namespace", "-n")
        code = VERBS[words[0]](words[1:], given, state, play)
        (HOME / "state.json").write_text(json.dumps(state))
    return code


def without(words: list[str], *options: str) -> list[str]:
    """Words without options that take a value."""
    kept = list(words)
    for option in options:
        while option in kept:
            at = kept.index(option)
            del kept[at : at + 2]
    return kept


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1] if option in words else ""


def get(words: list[str], given: str, state: dict, play: dict) -> int:
    if "--raw" in words:
        sys.stdout.write((HOME / "answers" / f"{value(words, '--raw').strip('/').replace('/', '_')}.json").read_text())
        return 0
    bare = [word for word in without(words, "--output", "-o", "--field-selector") if not word.startswith("-")]
    kinds, names = bare[0].split(","), bare[1:]
    if "pods" in kinds and len(kinds) == 2:  # a look at a job: the next one sees its next frame
        for key in state["objects"]:
            state["shown"][key] = min(state["shown"].get(key, -1) + 1, max(len(frames_of(key, state, play)) - 1, 0))
    found = [each for kind in kinds for each in several(kind, "--all-namespaces" in words, state, play)]
    found = [each for each in found if not names or each["metadata"]["name"] in names]
    if len(names) == 1:
        if found:
            print(json.dumps(found[0]))
    elif found or not names:
        print(json.dumps({"apiVersion": "v1", "kind": "List", "items": found}))
    return 0


def several(kind: str, everywhere: bool, state: dict, play: dict) -> list[dict]:
    """Objects of a kind: those that were recorded, those that were applied, and those of the frames that are on."""
    kind = kind.partition(".")[0].lower().removesuffix("s").replace("storageclasse", "storageclass")
    listed = HOME / "answers" / f"{kind}.json"
    every = json.loads(listed.read_text())["items"] if listed.is_file() else []
    if not everywhere:
        keys = [key for key in state["objects"] if key.partition("/")[0] == kind]
        every = every + [looked_at(key, state, play) for key in keys]
        every += shown(state, play, f"{kind}s")
    return every


def looked_at(key: str, state: dict, play: dict) -> dict:
    """An object as its frame has it."""
    frames = frames_of(key, state, play)
    status = {"status": frames[max(state["shown"].get(key, 0), 0)]["status"]} if frames else {}
    return {**state["objects"][key], **status}


def frames_of(key: str, state: dict, play: dict) -> list[dict]:
    plays = play.get(key, [])
    return plays[min(state["plays"].get(key, 0), len(plays) - 1)] if plays else []


def shown(state: dict, play: dict, part: str) -> list[dict]:
    """Pods or events of every frame that is on."""
    return [
        found
        for key, at in state["shown"].items()
        if key in state["objects"]
        for found in (frames_of(key, state, play)[at:] or [{}])[0].get(part, [])
    ]


def apply(words: list[str], given: str, state: dict, play: dict) -> int:
    for found in json.loads(given)["items"] if "--dry-run=server" not in words else []:
        key = f"{found['kind'].lower()}/{found['metadata']['name']}"
        state["objects"].setdefault(key, {}).update(found)
        if found["kind"] == "Pod":
            state["objects"][key]["status"] = {"phase": "Running"}
    return 0


def key_of(words: list[str]) -> str:
    return f"{words[0].partition('.')[0].removesuffix('s')}/{words[1]}"


def delete(words: list[str], given: str, state: dict, play: dict) -> int:
    key = key_of(words)
    if state["objects"].pop(key, None) is not None:
        state["plays"][key] = state["plays"].get(key, 0) + 1
        state["shown"].pop(key, None)
    return 0


def patch(words: list[str], given: str, state: dict, play: dict) -> int:
    state["objects"][key_of(words)]["spec"].update(json.loads(value(words, "--patch"))["spec"])
    return 0


def create(words: list[str], given: str, state: dict, play: dict) -> int:
    """A review of what the user may do."""
    asked = json.loads(given)
    assert asked["kind"] == "SelfSubjectRulesReview", asked
    print(json.dumps({**asked, "status": json.loads((HOME / "answers" / "rules.json").read_text())}))
    return 0


def logs(words: list[str], given: str, state: dict, play: dict) -> int:
    pod, since = words[-1], value(words, "--since-time")
    lines = {}
    for key, at in state["shown"].items():
        for frame in frames_of(key, state, play)[: at + 1]:
            lines |= frame.get("logs", {})
    for second, line in enumerate(lines.get(pod, [])):
        stamp = f"2026-11-27T08:00:{second:02}.000000000Z"
        if stamp >= since:
            print(stamp, line)
    return 0


def execute(words: list[str], given: str, state: dict, play: dict) -> int:
    """`tar` of a folder of the volume: its page says where it was."""
    import io
    import tarfile

    tar = words[words.index("--") + 1 :]
    assert tar[0] == "tar", tar
    page = f"report of {value(tar, '-C')}".encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo(f"{tar[-1]}/index.html")
        entry.size = len(page)
        archive.addfile(entry, io.BytesIO(page))
    sys.stdout.buffer.write(packed.getvalue())
    return 0


VERBS = {"get": get, "apply": apply, "delete": delete, "patch": patch, "create": create, "logs": logs, "exec": execute}

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
