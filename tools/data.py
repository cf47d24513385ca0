from passl.cli import data_main

data_main()
