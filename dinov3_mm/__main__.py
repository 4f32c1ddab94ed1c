"""``python -m dinov3_mm COMMAND`` is ``dinov3-mm COMMAND``."""

from dinov3_mm_cli import main

if __name__ == "__main__":
    main()
