"""``python -m hf_ft``, and with it ``accelerate launch -m hf_ft``, are the command ``hf-ft``."""

from hf_ft.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
