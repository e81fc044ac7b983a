"""``python -m zqfp_compile`` is ``zqfp-compile``."""

from zqfp_compile.cli import main

main()
