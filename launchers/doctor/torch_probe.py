"""`python -m trimaran.launchers.doctor.torch_probe`: whether torch can be imported, and what it sees, as JSON."""

import json


def main() -> None:
    """Print one line of JSON."""
    import torch
    from torch import distributed

    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    found = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "gpus": torch.cuda.device_count(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
        "gloo": distributed.is_available() and distributed.is_gloo_available(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
