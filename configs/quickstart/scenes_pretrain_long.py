# The same as scenes_pretrain.py for longer: 288,000 images drawn from 20,000 scenes.
_base_ = ['./scenes_pretrain.py']

max_iters = 4500
train_cfg = dict(max_iters=max_iters)
train_dataloader = dict(source=dict(length=20000))

train_scenes = dict(type='SyntheticScenes', length=4000, image_size=64)
test_scenes = dict(type='SyntheticScenes', length=2000, start=1000000, image_size=64)
custom_hooks = [
    dict(
        type='OptimScheduleHook',
        lr=dict(type='cosine', base=2e-3, final=1e-5, warmup_iters=200),
        weight_decay=0.04,
    ),
    dict(
        type='TeacherEMAHook',
        momentum=dict(type='cosine', base=0.985, final=1.0),
        teacher_temp=dict(type='linear', start=0.02, end=0.04, total_iters=2000),
    ),
    dict(type='DiagnosisHook', interval=250),
    dict(type='NonFiniteGuardHook'),
    dict(type='CollapseGuardHook'),
    dict(
        type='KNNEvalHook',
        interval=500,
        train_source=train_scenes,
        test_source=test_scenes,
        image_size=64,
    ),
]
