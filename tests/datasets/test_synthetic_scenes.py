"""SyntheticScenes: determinism, consistent truth, categories that pixels do not give away."""

import multiprocessing

import cv2
import numpy as np
import pytest
from mmengine.registry import DATASETS

from dinov3_mm.datasets.synthetic_scenes import Camera, SyntheticScenes


def test_images_are_a_function_of_seed_and_index():
    scenes = SyntheticScenes(20, seed=3, image_size=48)
    shifted = SyntheticScenes(10, seed=3, start=10, image_size=48)
    assert scenes.load_image(3).shape == (48, 48, 3) and scenes.load_image(3).dtype == np.uint8
    assert np.array_equal(scenes.load_image(15), shifted.load_image(5))
    assert scenes.label(15) == shifted.label(5)
    other = SyntheticScenes(20, seed=4, image_size=48)
    assert not np.array_equal(scenes.load_image(3), other.load_image(3))
    assert not np.array_equal(scenes.load_image(3), scenes.load_image(4))


def test_registered_by_name():
    scenes = DATASETS.build(dict(type="SyntheticScenes", length=2, image_size=32))
    assert isinstance(scenes, SyntheticScenes) and len(scenes) == 2


def test_ground_truth_agrees_with_itself():
    scenes = SyntheticScenes(30, image_size=64)
    for index in range(30):
        rendering, scene = scenes.render(index), scenes.scene(index)
        semantic, instances = scenes.semantic_mask(index), scenes.instances(index)
        categories = {item.object_id: item.category for item in scene.objects}
        depths = {item.object_id: item.depth for item in scene.objects}
        assert set(np.unique(rendering.ids)) - {0} == set(instances["ids"].tolist())
        for number, label, box, mask in zip(
            instances["ids"], instances["labels"], instances["boxes"], instances["masks"]
        ):
            assert label == categories[number]
            assert np.array_equal(mask, rendering.ids == number)
            assert np.all(semantic[mask] == label + 1)
            assert np.allclose(rendering.depth[mask], depths[number])
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [
                columns.min(),
                rows.min(),
                columns.max() + 1,
                rows.max() + 1,
            ]
        assert np.all(semantic[rendering.ids == 0] == 0)
        largest = max(scene.objects, key=lambda item: item.radius / item.depth)
        assert scenes.label(index) == largest.category


def test_near_objects_hide_far_ones():
    scenes = SyntheticScenes(200, image_size=48)
    found = 0
    for index in range(200):
        objects = scenes.scene(index).objects
        assert [item.depth for item in objects] == sorted((o.depth for o in objects), reverse=True)
        alone = scenes.render(index).ids
        found += len(np.unique(alone)) - 1 < len(objects)
    assert found > 0, "no scene in 200 has a hidden object"


def test_second_view_shows_parallax_and_clip_moves():
    scenes = SyntheticScenes(5, image_size=64)
    still = scenes.render(0)
    moved = scenes.render(0, Camera(x=0.3))
    assert not np.array_equal(still.image, moved.image)
    view, camera = scenes.second_view(0)
    again, _ = scenes.second_view(0)
    assert np.array_equal(view.image, again.image) and camera != Camera()
    frames = scenes.clip(0, num_frames=4)
    assert len(frames) == 4 and np.array_equal(frames[0].image, still.image)
    assert not np.array_equal(frames[0].image, frames[-1].image)
    near = max(scenes.scene(0).objects, key=lambda item: -item.depth)
    shift = _centroid(moved.ids == near.object_id) - _centroid(still.ids == near.object_id)
    expected = -0.3 * 3.0 / near.depth * 32
    assert abs(shift[1] - expected) < 2.0, "a camera step moves objects by focal length over depth"


def _centroid(mask: np.ndarray) -> np.ndarray:
    return np.array([positions.mean() for positions in np.nonzero(mask)])


def _read(arguments):
    scenes, index = arguments
    return scenes.load_image(index)


def test_cache_returns_the_same_images_and_survives_pickling():
    plain, cached = (
        SyntheticScenes(6, image_size=32),
        SyntheticScenes(6, image_size=32, cache=True),
    )
    for _ in range(2):
        for index in range(6):
            assert np.array_equal(plain.load_image(index), cached.load_image(index))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.map(_read, [(cached, 2)])[0], plain.load_image(2))
    cached.load_image(1)[:] = 0
    assert np.array_equal(plain.load_image(1), cached.load_image(1)), (
        "callers must not share memory"
    )


def test_all_categories_appear_and_facts_name_the_label():
    scenes = SyntheticScenes(300, image_size=16)
    labels = [scenes.label(index) for index in range(300)]
    assert set(labels) == set(range(scenes.num_classes)) and scenes.num_classes >= 10
    facts = scenes.facts(7)
    assert facts["objects"][0]["category"] == scenes.classes[scenes.label(7)]


@pytest.mark.parametrize(
    "arguments", [dict(length=0), dict(length=4, image_size=4), dict(length=4, start=-1)]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="SyntheticScenes needs"):
        SyntheticScenes(**arguments)


def test_index_out_of_range():
    with pytest.raises(IndexError, match="of a set of 3"):
        SyntheticScenes(3).load_image(3)


def _nearest_neighbour_accuracy(train, train_labels, test, test_labels, k=10) -> float:
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    similarity = test @ train.T
    nearest = np.argpartition(-similarity, k, axis=1)[:, :k]
    votes = np.zeros((len(test), 12))
    weights = np.exp(np.take_along_axis(similarity, nearest, 1) / 0.07)
    np.add.at(votes, (np.arange(len(test))[:, None], train_labels[nearest]), weights)
    return float((votes.argmax(1) == test_labels).mean())


def test_categories_are_not_readable_from_pixels():
    train = SyntheticScenes(1500, image_size=48)
    test = SyntheticScenes(500, start=10**6, image_size=48)
    images = [[s.load_image(i) for i in range(len(s))] for s in (train, test)]
    labels = [np.array([s.label(i) for i in range(len(s))]) for s in (train, test)]
    small = [
        np.stack([cv2.resize(i, (16, 16), interpolation=cv2.INTER_AREA).ravel() for i in x])
        for x in images
    ]
    small = [x.astype(np.float32) - small[0].mean(0) for x in small]
    pixels = _nearest_neighbour_accuracy(small[0], labels[0], small[1], labels[1])
    coded = [[(i // 32).astype(np.int64) @ [64, 8, 1] for i in x] for x in images]
    histograms = [
        np.stack([np.sqrt(np.bincount(i.ravel(), minlength=512)) for i in x]) for x in coded
    ]
    colours = _nearest_neighbour_accuracy(histograms[0], labels[0], histograms[1], labels[1])
    assert 1 / 12 < pixels <= 0.40, f"raw pixels reach {pixels:.1%}"
    assert 1 / 12 < colours <= 0.40, f"colour histograms reach {colours:.1%}"
