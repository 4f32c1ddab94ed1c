# Stage 2 on a folder of images without labels; see scenes_gram.py.
_base_ = ['./scenes_gram.py']

root = 'data/images'
train_dataloader = dict(
    source=dict(_delete_=True, type='ImageFolder', root=root, decode_min_side=96),
    small_images='upscale',
)
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
        type='RetrievalEvalHook',
        interval=100,
        source=dict(
            type='ReadableSubset',
            source=dict(type='ImageFolder', root=root, decode_min_side=96),
        ),
        image_size=64,
    ),
]
