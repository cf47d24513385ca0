"""SimSiam: simple Siamese networks (Chen & He 2021)."""

from passl.models.simsiam.method import SimSiam

__all__ = ["SimSiam"]
