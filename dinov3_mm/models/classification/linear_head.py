"""mmpretrain's linear classifier, with a check of what it is given."""

from mmengine.registry import MODELS
from mmpretrain.models import LinearClsHead
from torch import Tensor

from .width import check_width


@MODELS.register_module()
class DINOv3LinearClsHead(LinearClsHead):
    """``LinearClsHead`` that says which width the features have if it is another than its own.

    The released classifier of the ViT-7B is one, with ``num_classes=1000, in_channels=8192`` behind
    :class:`DINOv3ClsPatchNeck`; its file is of kind 'linear_classifier'. Weights start from
    N(0, 0.01), the bias from 0.

    Args:
        num_classes: classes.
        in_channels: width of the features.
        **kwargs: see ``LinearClsHead``.
    """

    # A probe is a small product, and what it shows should not depend on rounding.
    computes_in_fp32 = True

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        """The features (B, ``in_channels``) of the last entry.

        Raises:
            ValueError: if they are of another width.
        """
        return check_width(feats[-1], self.in_channels, type(self).__name__)
