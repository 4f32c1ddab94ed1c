# pipelines_512.py for images whose own short side is 1024 (Cityscapes, LoveDA): crops of 512 from images of short side
# 512 to 2048.
_base_ = './pipelines_512.py'

train_pipeline = _base_.train_pipeline
train_pipeline[2]['scale'] = (_base_.long_side, 1024)
test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = (_base_.long_side, 1024)
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1]['transforms'][0] = [
    dict(resize, scale=(_base_.long_side, side))
    for resize, side in zip(tta_pipeline[1]['transforms'][0], (512, 768, 1024, 1280, 1536, 1792))
]
