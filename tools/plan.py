from passl.cli import plan_main

if __name__ == "__main__":
    plan_main()
