"""One pipeline for samples that bring their image and for image files."""

from typing import Any

from mmengine.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadMissingImage:
    """Loads ``img_path`` like the host's ``LoadImageFromFile``, unless the sample has its ``img``.

    Args:
        **loader: arguments of ``LoadImageFromFile``.
    """

    def __init__(self, **loader: Any) -> None:
        self._config = dict(type="LoadImageFromFile", **loader)
        self._loader = None

    def __call__(self, results: dict) -> dict | None:
        if "img" in results:
            return results
        if self._loader is None:
            # Built on use: the loader is the host's, and a core install has none.
            self._loader = TRANSFORMS.build(self._config)
        return self._loader(results)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._config})"
