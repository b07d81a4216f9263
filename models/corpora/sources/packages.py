"""The Debian packages whose recordings are used, each pinned by the hash of the package and of the part that is used."""

from __future__ import annotations

from models.corpora.sources.debian import DebianPackage

AMAZON_QUEEN = DebianPackage(
    name="flight-of-the-amazon-queen",
    version="1.0.0-9",
    deb_sha256="40c08fd258d6fe95c46c1eaf5e9137f84ba330657995a281bd887c94a560a0f1",
    payload="usr/share/scummvm/flight-of-the-amazon-queen/queen.1c",
    payload_sha256="cc91960d133fcd4173eda4bac304e80d2bbdbaa085640287ab9e0507bd603f67",
    size_mib=34,
    licence="Flight of the Amazon Queen licence (free of charge; see the copyright file)",
)
TUX_PAINT = DebianPackage(
    name="tuxpaint-stamps-default",
    version="2022.06.04-1",
    deb_sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    payload="usr/share/tuxpaint/stamps",
    payload_sha256="2677de2e3c5dc79908680df3535896c65be5b2b124028f7a3cf805f14d5083b3",
    size_mib=154,
    licence="GPL-2",
)


def _asterisk(
    language: str, voice: str, deb_sha256: str, payload_sha256: str, size_mib: int, licence: str
) -> DebianPackage:
    return DebianPackage(
        name=f"asterisk-core-sounds-{language}-wav",
        version="1.6.1-1",
        deb_sha256=deb_sha256,
        payload=f"usr/share/asterisk/sounds/{voice}",
        payload_sha256=payload_sha256,
        size_mib=size_mib,
        licence=licence,
    )


# (language, package); each package has one voice.
ASTERISK_PROMPTS = (
    (
        "English",
        _asterisk(
            "en",
            "en_US_f_Allison",
            "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
            "f91f9ce0c2bf34eee254042c2e67187786f08961d1366f2a82b631fbb9036805",
            18,
            "CC-BY-SA-3.0 (Allison Smith, Digium)",
        ),
    ),
    (
        "Spanish",
        _asterisk(
            "es",
            "es_MX_f_Allison",
            "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903",
            "05b41770c843b22a84e553277f50c838d59b92c6b78b186651a085f2679f1a54",
            23,
            "CC-BY-SA-3.0 (Allison Smith, Digium)",
        ),
    ),
    (
        "French",
        _asterisk(
            "fr",
            "fr_CA_f_June",
            "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e",
            "f61a586db3fc64dc6b22cb97139f05db5247de3c7bd953b37c039e4e2ec5abb8",
            18,
            "CC-BY-SA-3.0 (June Wallack, Digium)",
        ),
    ),
    (
        "Italian",
        _asterisk(
            "it",
            "it_IT_m_Carlo",
            "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb",
            "d26660026f72cd018449f6caaacf0e9f4684fe93fc19a43440cfc6fcebd92f98",
            18,
            "CC-BY-3.0 (Carlo Flora)",
        ),
    ),
    (
        "Russian",
        _asterisk(
            "ru",
            "ru_RU_f_IvrvoiceRU",
            "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201",
            "0f6769437537fb74ee770ed5208a084c95a9786a71b0f98c31a23b5314bb2711",
            18,
            "CC-BY-3.0 (Maxim Topal)",
        ),
    ),
    (
        "Italian",
        DebianPackage(
            name="asterisk-prompt-it-menardi-wav",
            version="1:1.4.22+mm20110907-3.1",
            deb_sha256="3094530d98f8758ac275572d59624c41f60969fef883f34f4886d144f3dfeb21",
            payload="usr/share/asterisk/sounds/it_IT_f_Menardi",
            payload_sha256="f895e225b4395e05e38a5ed74a57639600be22c52e6f441f3170bcc70e0974ab",
            size_mib=18,
            licence="CC-BY-SA-3.0 (Marco Menardi, Paola Dal Zot)",
        ),
    ),
)
KTUBERLING = DebianPackage(
    name="ktuberling-data",
    version="4:22.12.3-1",
    deb_sha256="fba44c875bfa31ea488dadd9263e87a4dcaea0bd47d28817f6c0dc6d2af970ed",
    payload="usr/share/ktuberling/sounds",
    payload_sha256="3af25d112b1e3d864f4ec5c831140f53ed8d87967710674d5b6f7cbed8e2c13c",
    size_mib=45,
    licence="GPL-2+",
)
