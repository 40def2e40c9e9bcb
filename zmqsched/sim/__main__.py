import sys

from .tally import main

sys.exit(main())
