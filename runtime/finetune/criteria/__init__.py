"""The losses of methods that learn from more than single tokens, one file each."""

from trimaran.models.criterion import Criterion
from trimaran.runtime.finetune.comparable import preference_of
from trimaran.runtime.finetune.criteria.dpo import DPO
from trimaran.runtime.finetune.criteria.ipo import IPO
from trimaran.runtime.finetune.criteria.kto import KTO
from trimaran.runtime.finetune.criteria.orpo import ORPO
from trimaran.runtime.finetune.criteria.reward import Reward
from trimaran.runtime.spec import RunSpec

__all__ = ["DPO", "IPO", "KTO", "ORPO", "Reward", "criterion_of"]


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
            return KTO(
                settings.beta,
                settings.sft_weight,
                desirable_weight=settings.desirable_weight,
                undesirable_weight=settings.undesirable_weight,
            )
        case "orpo":
            return ORPO(settings.beta)
