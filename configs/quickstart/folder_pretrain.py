# Stage 1 on a folder of images without labels: tools/quickstart.sh DIR sets train_dataloader.source.root.
_base_ = ['./scenes_pretrain.py']

root = 'data/images'
train_dataloader = dict(
    source=dict(_delete_=True, type='ImageFolder', root=root, decode_min_side=96),
    small_images='upscale',
)
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
        type='RetrievalEvalHook',
        interval=200,
        source=dict(
            type='ReadableSubset',
            source=dict(type='ImageFolder', root=root, decode_min_side=96),
        ),
        image_size=64,
    ),
]
