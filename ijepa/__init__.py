"""I-JEPA: self-supervised pretraining of vision transformers by predicting in latent space.

The public names below are imported on first use, so that `import ijepa` stays quick.
"""

from importlib import import_module

_MODULES = {
    "IJEPA": "model",
    "MaskBatch": "masks.batch",
    "MultiBlockSampler": "masks.multiblock",
    "RasterizedSampler": "masks.strategies",
    "BlockSampler": "masks.strategies",
    "RandomSampler": "masks.strategies",
    "Trainer": "train.trainer",
    "StepResult": "train.trainer",
    "load_official": "interop",
    "load_pretrained": "interop",
    "load_run": "interop",
    "load_recipe": "recipes",
    "Recipe": "config",
    "ModelConfig": "config",
    "MaskConfig": "config",
    "DataConfig": "config",
    "OptimConfig": "config",
    "ScheduleConfig": "config",
    "TrainConfig": "config",
    "MonitorConfig": "config",
    "VIT_SIZES": "config",
}

__all__ = list(_MODULES)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'ijepa' has no attribute {name!r}")
    return getattr(import_module(f"ijepa.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
