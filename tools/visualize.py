from passl.cli import visualize_main

if __name__ == "__main__":
    visualize_main()
