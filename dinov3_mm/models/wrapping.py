"""A model without what wraps it for several processes, or for augmented tests."""

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model whose attributes configs describe.

    DDP and MMEngine's ``BaseTTAModel`` hold it as ``module``, one in the other if there are both;
    ``fully_shard`` changes a model in place and wraps nothing.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
