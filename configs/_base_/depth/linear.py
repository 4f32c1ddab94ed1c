# The linear probe of depth: batch norm and a linear layer on the patches of the last layer, 256 bins.
_base_ = ['./estimator.py']

model = dict(
    decode_head=dict(
        type='DINOv3LinearDepthHead',
        use_batchnorm=True,
        use_cls_token=False,
        num_bins=256,
        min_depth=1e-3,
        max_depth=10.0,
        loss_decode=dict(type='DINOv3SigLoss', warm_up=100),
    ),
)
