# Mask2Former (arXiv 2112.01527) over a pyramid of strides 4 to 32: an adapter around a frozen ViT, or a ConvNeXt.
# A leaf gives backbone, statistics and decode_head.in_channels. Losses, matching and optimizer are mmseg's; what the
# released segmentor was trained with is not published.
default_scope = 'mmseg'
custom_imports = dict(
    imports=['dinov3_mm', 'dinov3_mm.models.segmentation', 'dinov3_mm.models.segmentation.mask2former']
)

model = dict(
    type='DINOv3PaddedEncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', bgr_to_rgb=True, pad_val=0, seg_pad_val=255),
    decode_head=dict(
        type='DINOv3Mask2FormerHead',
        feat_channels=256,
        num_heads=8,
        encoder_ffn_channels=1024,
        decoder_ffn_channels=2048,
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
# The widths of the released segmentor.
wide = dict(feat_channels=2048, num_heads=16, encoder_ffn_channels=4096, decoder_ffn_channels=4096)

no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05, betas=(0.9, 0.999)),
    clip_grad=dict(max_norm=0.01, norm_type=2),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys=dict(query_embed=no_decay, query_feat=no_decay, level_embed=no_decay, level_encoding=no_decay),
    ),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=5000, max_keep_ckpts=1, save_best='mIoU'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
custom_hooks = [dict(type='FrozenBackboneHook')]
log_processor = dict(by_epoch=False)
# Batch norms of the adapter over all GPUs; it is of no effect on one, and must be None for several CPU processes.
sync_bn = 'torch'

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
# On a GPU products are in bf16 (autocast); losses, matching and linear probes stay in fp32. 'fp32' switches it off.
compute_dtype = 'auto'
randomness = dict(seed=0)

# Several scales and flips: --tta of mmseg's tools, see docs/adapter.md.
tta_model = dict(type='SegTTAModel')
