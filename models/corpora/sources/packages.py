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


def _drascula(package: str, language: str, deb_sha256: str, payload_sha256: str, size_mib: int) -> DebianPackage:
    return DebianPackage(
        name=package,
        version="1.0+ds4-2",
        deb_sha256=deb_sha256,
        payload=f"usr/share/scummvm/drascula/{language}",
        payload_sha256=payload_sha256,
        size_mib=size_mib,
        licence="Drascula licence (free of charge; see the copyright file)",
    )


# (language, package); the lines have the same names.
DRASCULA = (
    (
        "English",
        _drascula(
            "drascula",
            "en",
            "ed4af8e2d41ad446e2f3b73533daa1804e2f13f62f596c0b02b8dc39544f22b4",
            "5515b49acf1b797de4597ab71e814d0c1ce1e201f07190aa6fb171f59d84c3bc",
            26,
        ),
    ),
    (
        "Spanish",
        _drascula(
            "drascula-spanish",
            "es",
            "87b5f12df3fcd7ca16097c802dff1ab55e40c9ebc21209fa3f031e1661b4b8e5",
            "ded6b115142c18f9381406437ec79c0d18f0733b900ba9d134a6e8a423816da6",
            13,
        ),
    ),
)
FILLETS_SPEECH = DebianPackage(
    name="fillets-ng-data-cs",
    version="1.0.1-1.1",
    deb_sha256="3ecef99b9456f1c80c9625c6f2418642b52d58e7167a46bad7a412db17991b14",
    payload="usr/share/games/fillets-ng/sound",
    payload_sha256="05b89702593956ce1a2bc838d62f5cba2b20dc51ac58025e94eb8cac153565ee",
    size_mib=38,
    licence="GPL-2",
)
FILLETS_SCRIPTS = DebianPackage(
    name="fillets-ng-data",
    version="1.0.1-1.1",
    deb_sha256="25de89afd8b1adf7bcace8290248a6a22c89cd42300317e69000e162c032cf84",
    payload="usr/share/games/fillets-ng/script",
    payload_sha256="142b758ef748c628212327a19200006ea1f8a28cad553716d3bb06c3e7efd58b",
    size_mib=68,
    licence="GPL-2",
)
HEDGEWARS = DebianPackage(
    name="hedgewars-data",
    version="1.0.2-6",
    deb_sha256="722225903a72604403e6e0026e40e9a6953f47a74d94efc5f55504bc05bb4761",
    payload="usr/share/games/hedgewars/Data/Sounds/voices",
    payload_sha256="b4e9bb9a137740d48b5fcd2f74a37d1718074dbd45ef47dac7281023fdd0db20",
    size_mib=139,
    licence="GFDL-1.3",
)
