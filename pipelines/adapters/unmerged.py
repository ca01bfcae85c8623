"""A model with an adapter on it, unmerged: to compare with, to try, and for the methods that cannot be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipelines.adapters import fit
from pipelines.errors import UserError
from pipelines.mgm.adapter import trained_on
from pipelines.mgm.directory import check_plain_directory
from pipelines.mgm.load import load_model, load_skeleton
from pipelines.modelfiles import model_identity


def with_adapter(model: Path, adapter: Path, dtype: str = "float32", device: torch.device | str = "cpu") -> Any:
    """The base model with everything that the adapter directory holds, PEFT's layers apart.

    Args:
        dtype: of the base's weights, as of `load_model`.

    Returns:
        A `PeftModel`, or the plain model where PEFT trained nothing.

    Raises:
        UserError: the adapter does not belong on this model.
    """
    found = _fitting(model, adapter)
    base = load_model(model, dtype, device)
    own = dict(base.named_parameters())
    with torch.no_grad():
        for name, tensor in found.whole.items():
            own[name].copy_(tensor)
    if found.config is None:
        return base
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(adapter)).requires_grad_(False).eval()


def refuse_misfit(model: Path, adapter: Path) -> None:
    """Refuse an adapter that does not belong on this model, before anything is loaded.

    Raises:
        UserError: as `with_adapter`, or it was trained on another model.
    """
    _fitting(model, adapter)
    own, base = trained_on(adapter), model_identity(model)
    if own not in (base, None):
        raise UserError(f"{adapter}: was trained on another model than {model} (identity {own}, not {base})")


def _fitting(model: Path, adapter: Path) -> fit.Fit:
    """What `fit.look` finds; that an adapter cannot be merged is no matter here."""
    check_plain_directory(model)
    found = fit.look(adapter, load_skeleton(model))
    if faults := {check: texts for check, texts in found.faults.items() if check != "method"}:
        raise UserError(f"{adapter} does not fit {model}: {fit.told(faults)}")
    return found
