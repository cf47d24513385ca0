from passl.cli import doctor_main

if __name__ == "__main__":
    doctor_main()
