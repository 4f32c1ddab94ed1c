# DPT on four layers, as the official constructor builds it. A leaf gives backbone.out_indices and the widths.
_base_ = ['./estimator.py']

model = dict(
    decode_head=dict(
        type='DINOv3DPTDepthHead',
        channels=512,
        hidden_channels=32,
        readout='ignore',
        use_batchnorm=True,
        use_bias=False,
        projection_after_fusion=True,
        num_bins=256,
        min_depth=1e-3,
        max_depth=10.0,
        # Edges by the gradients of the logarithm; without them predictions are soft at objects' borders.
        loss_decode=[
            dict(type='DINOv3SigLoss', warm_up=100),
            dict(type='DINOv3DepthGradientLoss', log=True, loss_weight=0.5),
        ],
    ),
)
