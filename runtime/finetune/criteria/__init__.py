"""The losses of methods that learn from more than single tokens, one file each."""

from trimaran.models.criterion import Criterion
from trimaran.runtime.finetune.criteria.dpo import DPO
from trimaran.runtime.finetune.criteria.ipo import IPO
from trimaran.runtime.finetune.criteria.kto import KTO
from trimaran.runtime.finetune.criteria.orpo import ORPO
from trimaran.runtime.finetune.criteria.reward import Reward
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.spec.sections.finetune import PreferenceSettings

__all__ = ["DPO", "IPO", "KTO", "ORPO", "Reward", "criterion_of", "preference_of"]


def preference_of(spec: RunSpec) -> PreferenceSettings | None:
    """Return the settings of method preference; None for another method."""
    if spec.finetune is None or spec.finetune.method != "preference":
        return None
    return spec.finetune.preference or PreferenceSettings()


def criterion_of(spec: RunSpec) -> Criterion | None:
    """Return what makes the loss of a run; None where it is the cross entropy of tokens."""
    if spec.finetune is not None and spec.finetune.method == "reward":
        return Reward(spec.finetune.centering)
    settings = preference_of(spec)
    if settings is None:
        return None
    match settings.loss:
        case "dpo":
            return DPO(settings.beta, settings.label_smoothing, settings.sft_weight)
        case "ipo":
            return IPO(settings.beta, settings.sft_weight)
        case "kto":
            return KTO(settings.beta, settings.sft_weight)
        case "orpo":
            return ORPO(settings.beta)
