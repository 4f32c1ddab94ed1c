# Stage 3 on SyntheticScenes: larger crops of changing sizes, from the EMA teacher of stage 2, which is also the Gram teacher:
#   python tools/train.py configs/quickstart/scenes_high_res.py --from-stage work_dirs/scenes_gram
_base_ = ['./scenes_gram.py']

stage = dict(kind='high_res')

max_iters = 40
train_cfg = dict(max_iters=max_iters, global_batch_size=32)

sizes = ('global_size', 'local_size', 'gram_size')
other_settings = {key: value for key, value in _base_.train_dataloader.transform.items() if key not in sizes}
other_settings.update(
    type='MultiResolutionCrop',
    # Up to twice the crops of the stages before; as in the release, the Gram teacher sees 1.5 times the size.
    size_sets=[
        dict(global_size=64, local_size=24, gram_size=96, ratio=0.5),
        dict(global_size=96, local_size=32, gram_size=144, ratio=0.5),
    ],
)
train_dataloader = dict(
    source=dict(length=2000, image_size=96, cache=False),
    transform=dict(_delete_=True, **other_settings),
)

custom_hooks = [
    dict(
        type='OptimScheduleHook',
        lr=dict(type='warmup_cosine', start=0.0, peak=0.0, end=1e-4),
        weight_decay=0.04,
    ),
    dict(type='TeacherEMAHook', momentum=0.95, teacher_temp=0.04, dino_local_weight=0.5),
    dict(type='GramAnchorHook', checkpoint=None, weight=1.5),
    *_base_.custom_hooks[3:],
]
custom_hooks[-1]['interval'] = max_iters
