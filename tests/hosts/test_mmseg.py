"""DINOv3ViT in mmseg's EncoderDecoder, with a linear head and with UPerNet over a pyramid."""

import pytest
import torch

from tests.hosts import toys
from tests.hosts.lane import require_hosts

require_hosts()

PREPROCESSOR = {
    "type": "SegDataPreProcessor",
    "bgr_to_rgb": True,
    "size": (64, 64),
    "pad_val": 0,
    "seg_pad_val": 255,
    **toys.STATISTICS,
}
# A linear classifier of patches: mmseg's FCN head without convolutions.
LINEAR = {
    "type": "FCNHead",
    "in_channels": toys.DIMS,
    "channels": toys.DIMS,
    "num_convs": 0,
    "concat_input": False,
    "dropout_ratio": 0.0,
    "num_classes": 4,
    "align_corners": False,
}
UPERNET = {
    "type": "UPerHead",
    "in_channels": [16] * 4,
    "in_index": [0, 1, 2, 3],
    "channels": 8,
    "num_classes": 4,
    "align_corners": False,
    "norm_cfg": {"type": "BN"},
}
PYRAMID = {
    "type": "SimpleFeaturePyramid",
    "in_channels": toys.DIMS,
    "out_channels": 16,
    "in_stride": toys.PATCH,
}


def samples():
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(4)
    result = []
    for _ in range(2):
        sample = SegDataSample(metainfo={"img_shape": (64, 64), "ori_shape": (48, 40)})
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 4, (1, 64, 64), generator=generator))
        result.append(sample)
    return result


@pytest.mark.parametrize(("head", "neck"), [(LINEAR, None), (UPERNET, PYRAMID)])
def test_segmentor_on_frozen_features(head, neck, tmp_path):
    model = {
        "type": "EncoderDecoder",
        "data_preprocessor": PREPROCESSOR,
        "backbone": toys.backbone_config(tmp_path),
        "decode_head": head,
        "train_cfg": {},
        "test_cfg": {"mode": "slide", "crop_size": (48, 48), "stride": (32, 32)},
    }
    if neck:
        model["neck"] = neck
    model = toys.build_model("mmseg", model, tmp_path)
    outcome = toys.run(model, samples())
    assert {"decode.loss_ce", "decode.acc_seg"} == set(outcome.losses)
    for prediction in outcome.predictions:
        assert prediction.seg_logits.data.shape == (4, 48, 40)
        assert prediction.pred_sem_seg.data.shape == (1, 48, 40)
    toys.assert_backbone_is_frozen_and_loaded(model.backbone)
    toys.assert_trains(model.decode_head.conv_seg, *([model.neck] if neck else []))
