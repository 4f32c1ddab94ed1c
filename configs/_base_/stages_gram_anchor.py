# ViT-S, -B and -L, stage 2 of 3: Gram anchoring; see stages_pretrain.py.
#   bash tools/dist_train.sh configs/dinov3/vits_gram_anchor.py GPUS --data DIR --from-stage STAGE_1_DIR
# Iterations count from 0. Weights, heads and the moments of the optimizer go on from stage 1.
_base_ = ['./stages_pretrain.py']

# gram_iter=None: the end of stage 1 anchors. An early teacher (--gram-iter) is better only if the dense probe has fallen since.
stage = dict(kind='gram_anchor', iterations='own', gram_iter=None)

# As the satellite 7B; the scores of the web 7B recover within as many.
max_iters = 10_000
train_cfg = dict(max_iters=max_iters)

model = dict(gram=dict(img_level=True))
# The Gram teacher sees the crops at twice the resolution, undistorted.
train_dataloader = dict(transform=dict(gram_size=512, gram_no_distortions=True))

custom_hooks = [
    dict(
        type='OptimScheduleHook',
        lr=None,                # 0.6 of stage 1, as for the 7B; no warm-up, since the moments go on
        scaling_rule='sqrt_wrt_1024',
        weight_decay=0.04,
    ),
    # As for the 7B, from iteration 0 on.
    dict(
        type='TeacherEMAHook',
        momentum=0.999,
        teacher_temp=0.07,
        dino_local_weight=dict(type='warmup_cosine', start=1.0, peak=1.0, end=0.5, cosine_iters=1000),
    ),
    *_base_.custom_hooks[2:],
    dict(
        type='GramAnchorHook',
        checkpoint=None,        # --from-stage sets it
        weight=dict(type='warmup_cosine', start=0.0, peak=0.0, end=2.0, cosine_iters=1000),
    ),
]
