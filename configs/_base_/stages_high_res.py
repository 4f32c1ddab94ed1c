# ViT-S, -B and -L, stage 3 of 3: high resolution; see stages_pretrain.py.
#   bash tools/dist_train.sh configs/dinov3/vits_high_res.py GPUS --data DIR --from-stage STAGE_2_DIR
# A run of its own with a fresh optimizer: student, EMA teacher and heads start from the EMA teacher of the stage before, which is
# also the Gram teacher. Images must have 512 px or small_images='upscale'.
_base_ = ['./stages_pretrain.py']

stage = dict(kind='high_res')

max_iters = 10_000                     # 7B
train_cfg = dict(max_iters=max_iters)

model = dict(
    backbone=dict(with_cp=True),       # crops of 768 px have nine times the tokens of stage 1
    gram=dict(img_level=True),
    prototype_chunk_size=8192,         # thousands of masked patches a GPU
)

train_dataloader = dict(
    # The sizes of the 7B.
    transform=dict(
        _delete_=True,
        type='MultiResolutionCrop',
        size_sets=[
            dict(global_size=512, local_size=112, gram_size=768, ratio=0.3),
            dict(global_size=768, local_size=112, gram_size=1152, ratio=0.3),
            dict(global_size=768, local_size=168, gram_size=1152, ratio=0.3),
            dict(global_size=768, local_size=224, gram_size=1152, ratio=0.05),
            dict(global_size=768, local_size=336, gram_size=1152, ratio=0.05),
        ],
        num_local=8,
        gram_no_distortions=True,
        partial_patches=True,     # 168 = 10.5 patches, of which the backbone sees ten, as in the release
    ),
)

custom_hooks = [
    dict(
        type='OptimScheduleHook',
        # Half a cosine up to a quarter of stage 1, as for the 7B.
        lr=dict(type='warmup_cosine', start=0.0, peak=0.0, end=None),
        scaling_rule='sqrt_wrt_1024',
        weight_decay=0.04,
    ),
    dict(type='TeacherEMAHook', momentum=0.999, teacher_temp=0.07, dino_local_weight=0.5),
    *_base_.custom_hooks[2:],
    dict(type='GramAnchorHook', checkpoint=None, weight=1.5),   # --from-stage sets the checkpoint
]

default_hooks = dict(checkpoint=dict(interval=250, keep_every=None))
