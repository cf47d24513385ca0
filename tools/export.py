from passl.cli import export_main

if __name__ == "__main__":
    export_main()
