from passl.cli import data_main

if __name__ == "__main__":
    data_main()
