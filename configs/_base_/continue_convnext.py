# Continue pretraining of a ConvNeXt; see continue.py.
_base_ = ['./continue.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='DINOv3ConvNeXt',
        init_cfg=dict(type='DINOv3Pretrained', checkpoint=None),
    ),
    # A ConvNeXt has no mask token: the iBOT term compares patches that the student sees, as in its distillation.
    mask_student=False,
)

# Stride 32: 7 x 7 patches in a global, 3 x 3 in a local crop.
train_dataloader = dict(masking=dict(patch_size=32))

optim_wrapper = dict(paramwise_cfg=dict(layerwise_decay=1.0, patch_embed_lr_mult=1.0))  # ConvNeXt recipes
