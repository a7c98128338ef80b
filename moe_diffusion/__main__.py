"""`python -m moe_diffusion COMMAND ...`, the same as `moe-diffusion COMMAND ...`."""

from moe_diffusion.cli import main

if __name__ == "__main__":
    main()
