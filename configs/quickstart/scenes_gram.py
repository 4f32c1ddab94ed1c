# Stage 2 on SyntheticScenes: the same losses plus Gram anchoring to the teacher of stage 1, which sees the crops at
# 1.5 times the resolution. Give the work folder of stage 1 on the command line (tools/quickstart.py does):
#   python tools/train.py configs/quickstart/scenes_gram.py --from-stage work_dirs/scenes_pretrain
_base_ = ['./scenes_pretrain.py']

stage = dict(kind='gram_anchor')

max_iters = 100
train_cfg = dict(max_iters=max_iters)
model = dict(gram=dict(img_level=True))
train_dataloader = dict(transform=dict(gram_size=72, gram_no_distortions=True))

custom_hooks = [
    dict(
        type='OptimScheduleHook',
        lr=dict(type='warmup_cosine', start=0.0, peak=5e-4, end=0.0, warmup_iters=20),
        weight_decay=0.04,
    ),
    dict(type='TeacherEMAHook', momentum=0.99, teacher_temp=0.04),
    dict(type='GramAnchorHook', checkpoint=None, weight=2.0),
    dict(type='DiagnosisHook', interval=50),
    dict(type='NonFiniteGuardHook'),
    dict(type='CollapseGuardHook'),
    dict(
        type='DenseProbeHook',
        interval=max_iters,
        train_source=dict(type='SyntheticScenes', length=1000, image_size=64),
        test_source=dict(type='SyntheticScenes', length=500, start=1000000, image_size=64),
        image_size=64,
    ),
]
