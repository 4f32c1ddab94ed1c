# Satellite images: statistics of the released SAT-493M models (README) and where the images are. SAT-493M: 493 M random tiles of
# 512 x 512 px at 0.6 m, RGB, which is not public.
satellite_statistics = dict(
    type='MultiCropPreprocessor', mean=[0.430, 0.411, 0.296], std=[0.213, 0.156, 0.143]
)
satellite_images = dict(type='ImageFolder', root='data/satellite')
