# Three kinds of students from one teacher on SyntheticScenes, in turn on one process or on several: a ViT, a ConvNeXt and a ResNet
# of timm. The teacher is that of scenes_pretrain.py:
#   python tools/train.py configs/quickstart/scenes_distill_multi.py --teacher WORK_DIR/checkpoints/iter_00000800.pth
_base_ = ['./scenes_pretrain.py']

max_iters = 300
train_cfg = dict(max_iters=max_iters, global_batch_size=32)

backbone = _base_.model.backbone
backbone.pop('rope_rescale_coords')
head = dict(type='DINOv3Head', hidden_dims=256, bottleneck_dims=64)  # prototypes are the teacher's

model = dict(
    _delete_=True,
    type='MultiDistillation',
    teacher=dict(backbone=backbone, dino_head=_base_.model.dino_head, ibot_head=_base_.model.ibot_head),
    student=dict(dino_head=head, ibot_head=head, koleo=dict(weight=0.1, distributed=True)),
    students=dict(
        vit=dict(backbone=dict(**{**backbone, 'arch': dict(embed_dims=64, num_layers=2, num_heads=2)})),
        # Stride 32: the teacher sees the crops at a quarter of their size, 16 px, where its own k-NN is 18 to 22 % (30 % at 64 px).
        convnext=dict(
            backbone=dict(
                type='DINOv3ConvNeXt',
                arch=dict(depths=[1, 1, 2, 1], dims=[24, 48, 96, 128]),
                layer_scale_init_value=1.0,
            ),
        ),
        # Narrowed to less than the teacher's size: at full width (4.9 M parameters) random weights score 36 %, more than the teacher,
        # and this short run adds nothing to them (36.4 -> 36.8 %). Dilated to stride 8, so that the teacher sees whole crops; the gain
        # of that is within the noise (35.4 against 33.2 % with stride 32, from 24.8 %, seed 0).
        # Batch norms with the statistics of all processes: allowed under a frozen teacher.
        resnet=dict(
            backbone=dict(
                type='TimmBackbone',
                name='resnet10t',
                batch_norm='sync',
                model_args=dict(channels=[16, 32, 64, 128], stem_width=16, output_stride=8),
            ),
        ),
    ),
)

# Crops that both strides divide.
train_dataloader = dict(transform=dict(global_size=64, local_size=32))

custom_hooks = [
    dict(type='DistillationHook', checkpoint=None),
    *[
        dict(type='PerStudentHook', hook=hook)
        for hook in _base_.custom_hooks
        if hook['type'] not in ('KNNEvalHook', 'CollapseGuardHook')
    ],
    dict(
        type='PerStudentHook',
        hook=dict(
            type='KNNEvalHook',
            interval=max_iters,
            train_source=dict(type='SyntheticScenes', length=1000, image_size=64),
            test_source=dict(type='SyntheticScenes', length=500, start=1000000, image_size=64),
            image_size=64,
        ),
    ),
]
