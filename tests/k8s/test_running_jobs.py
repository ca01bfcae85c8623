"""What the API server refuses once `k8s/running-jobs.yaml` is applied: its expressions, evaluated as CEL."""

from __future__ import annotations

import copy
from typing import Any

import celpy
import pytest
import yaml

from k8s import render
from ray_jobs import _options, run
from tests.k8s import schemas

Object = dict[str, Any]
POLICY, BINDING = yaml.safe_load_all((render.FOLDER / "running-jobs.yaml").read_text())


def job(**changes: Any) -> Object:
    """A rendered job as the API server holds it."""
    recipe, _ = _options.parse(run.COMMAND, ["sample", *(f"--{key}={value}" for key, value in changes.items())])
    (found,) = (found for found in render.render(recipe, "kind") if found["kind"] == "RayJob")
    return found


def evaluated(expression: str, **given: Any) -> Any:
    environment = celpy.Environment()
    names = {name: celpy.json_to_cel(value) for name, value in given.items()}
    return environment.program(environment.compile(expression)).evaluate(names)


def refusal(old: Object, new: Object) -> str:
    """What whoever applies `new` over `old` is told; empty when it is let through."""
    (rule,) = POLICY["spec"]["validations"]
    objects = {"oldObject": old, "object": new}
    variables: Object = {}
    for entry in POLICY["spec"]["variables"]:
        value = evaluated(entry["expression"], **objects, variables=variables)
        variables[entry["name"]] = bool(value) if entry["name"] == "atWork" else str(value)
    if evaluated(rule["expression"], **objects, variables=variables):
        return ""
    return str(evaluated(rule["messageExpression"], **objects, variables=variables))


def at(state: str, found: Object) -> Object:
    return copy.deepcopy(found) | {"status": {"jobDeploymentStatus": state}}


def test_a_changed_recipe_is_refused_while_a_job_is_at_work() -> None:
    mine, changed = job(), job(**{"train.lora.rank": 4})
    for state in ("Initializing", "Running", "Retrying", "Waiting"):
        said = refusal(at(state, mine), at(state, changed))
        assert "rayjob captune-sample-run is at work on another recipe" in said
        assert "kubectl -n captune delete rayjob captune-sample-run" in said
    assert refusal(mine, changed), "just applied, and no status yet"
    bare = copy.deepcopy(changed)
    del bare["metadata"]["annotations"]
    assert refusal(at("Running", mine), bare), "nor can it lose its mark"


def test_everything_else_goes_through() -> None:
    mine, changed = job(), job(**{"train.lora.rank": 4})
    suspended = copy.deepcopy(mine)
    suspended["spec"]["suspend"] = True
    for old, new in (
        (at("Running", mine), at("Running", mine) | {"spec": {"suspend": True}}),
        (at("Complete", mine), changed),
        (at("Failed", mine), changed),
        (suspended, changed),
    ):
        assert refusal(old, new) == ""
    shelf = next(found for found in render_shelf() if found["metadata"]["name"] == "captune-run")
    assert refusal(at("Running", shelf), at("Running", shelf)) == ""


def render_shelf() -> list[Object]:
    from k8s import kustomize

    return kustomize.build(render.FOLDER / "overlays" / "kind")


def test_the_policy_is_valid_and_meets_this_namespaces_jobs_alone() -> None:
    assert [schemas.errors(found) for found in (POLICY, BINDING)] == [[], []]
    assert BINDING["spec"]["policyName"] == POLICY["metadata"]["name"]
    (name,) = BINDING["spec"]["matchResources"]["namespaceSelector"]["matchLabels"].values()
    assert name == job()["metadata"]["namespace"]


@pytest.mark.parametrize("broken", ["variables.before ==", "variables.nothing == ''"])
def test_a_broken_expression_is_an_error(broken: str) -> None:
    with pytest.raises((celpy.CELParseError, celpy.CELEvalError)):
        evaluated(broken, variables={"before": "a"})
