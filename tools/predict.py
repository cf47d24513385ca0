from passl.cli import predict_main

if __name__ == "__main__":
    predict_main()
