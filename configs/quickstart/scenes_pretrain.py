# Stage 1 on SyntheticScenes: DINO + iBOT + KoLeo from random weights.
_base_ = ['../_base_/pretrain_runtime.py', '../_base_/dinov3_toy.py']

max_iters = 800
train_cfg = dict(type='PretrainLoop', max_iters=max_iters, global_batch_size=64)
train_dataloader = dict(
    source=dict(type='SyntheticScenes', length=8000, image_size=64, cache=True),
)

train_scenes = dict(type='SyntheticScenes', length=4000, image_size=64)
test_scenes = dict(type='SyntheticScenes', length=2000, start=1000000, image_size=64)
custom_hooks = [
    dict(
        type='OptimScheduleHook',
        lr=dict(type='cosine', base=2e-3, final=1e-5, warmup_iters=100),
        weight_decay=0.04,
    ),
    dict(
        type='TeacherEMAHook',
        momentum=dict(type='cosine', base=0.98, final=1.0),
        teacher_temp=dict(type='linear', start=0.02, end=0.04, total_iters=400),
    ),
    dict(type='DiagnosisHook', interval=250),
    dict(type='NonFiniteGuardHook'),
    dict(type='CollapseGuardHook'),
    dict(
        type='KNNEvalHook',
        interval=200,
        train_source=train_scenes,
        test_source=test_scenes,
        image_size=64,
    ),
]
