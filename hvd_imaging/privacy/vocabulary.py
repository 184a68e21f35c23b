"""Words that name nobody: defined terms of DICOM, makers of machines, terms of anatomy.

Code strings (VR CS) are meant for defined terms, but nothing keeps a site from writing a name into one. So what is kept
are words of this list; everything else leaves.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import re
from collections.abc import Collection, Iterable

_TERMS = """
YES NO Y N NONE OTHER UNKNOWN UNDEFINED TRUE FALSE ON OFF AUTO MANUAL FULL PARTIAL AUTOMATIC SEMIAUTOMATIC
ORIGINAL DERIVED PRIMARY SECONDARY MIXED
AXIAL LOCALIZER SCOUT SURVEY REFORMATTED MPR CPR MIP MINIP AVERAGE AVG PROJECTION RESAMPLED FILTERED SUBTRACTION ADDITION
SUM MEAN MEDIAN MIN MAX VOLUME VOLUMETRIC SAMPLED DISTORTED SINGLE PLANE BIPLANE MULTIPLANAR STITCHED TIME_SERIES DYNAMIC STATIC
GATED WHOLE BODY RECON TOMO TOMOGRAPHIC TOMOSYNTHESIS GENERATED_2D PERFUSION DIFFUSION ANGIO ANGIOGRAPHIC CINE FUNCTIONAL FLUOROSCOPY FLOW
ECHO GRADIENT SPIN INVERSION PHASE MAP MAGNITUDE REAL IMAGINARY M P R I FA ADC TRACE TRACEW EADC ISO B0 BVALUE CBF CBV MTT TTP
TMAX T1 T2 T2_STAR PD PROTON_DENSITY STIR FLAIR TOF MRA DWI SWI DTI EPI FSE TSE GRE SE GR IR RM SK MTC SS MT TRSS SP MP OSP PFP PFF
SAT FS FC PEAK_LOCKED NORM ND DIS2D DIS3D FIL FM MOSAIC CSA MFSPLIT DIXON WATER FAT IN_PHASE OPP_PHASE WATER_FAT OUT_PHASE
PER CG PPG RG FREQ SLICE PHASE_ENCODING ROW COLUMN COL ZERO ONE TWO THREE
CT MR PT NM US CR DX MG XA RF XC SC OT ES GM SM OP OPT OCT IVUS IVOCT BI PX IO SEG RTSTRUCT RTDOSE RTIMAGE REG KO PR SR ECG MS DG
LEFT RIGHT BOTH UNPAIRED L U B A F H S LA RA LP RP AL AR PL PR LF RF LH RH AF AH PF PH FL FR FP HL HR HA HP FA
HFS HFP HFDR HFDL FFS FFP FFDR FFDL LFP LFS RFP RFS AFDR AFDL PFDR PFDL
SUPINE PRONE DECUBITUS STANDING ERECT RECUMBENT LATERAL AP PA LL RL LLD RLD LLO RLO LAO RAO MLO CC ML LM LMO CCO XCC XCCL XCCM FB SIO AT
HEAD BRAIN SKULL FACE ORBIT EYE EAR NOSE SINUS JAW NECK CSPINE TSPINE LSPINE SPINE SSPINE COCCYX CHEST THORAX LUNG HEART BREAST RIB
STERNUM CLAVICLE SHOULDER ARM HUMERUS ELBOW FOREARM WRIST HAND FINGER THUMB ABDOMEN LIVER KIDNEY PANCREAS SPLEEN PELVIS HIP BLADDER
PROSTATE UTERUS EXTREMITY LEG FEMUR THIGH KNEE CALF ANKLE FOOT TOE HEEL WHOLEBODY ABDOMENPELVIS CHESTABDOMEN CHESTABDPELVIS
HEADNECK NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELVIS AORTA CAROTID CORONARY COLON BOWEL STOMACH ESOPHAGUS THYROID TRACHEA ADRENAL
MONOCHROME1 MONOCHROME2 RGB YBR_FULL YBR_FULL_422 YBR_PARTIAL_422 YBR_PARTIAL_420 YBR_ICT YBR_RCT PALETTE COLOR HSV ARGB CMYK TRUE_COLOR
HU US OD BQML CNTS GML CPS NCI MGML PCNT CM2ML CM2 UMOL UNITLESS DVPX PHANTOM
IDENTITY INVERSE LINEAR LINEAR_EXACT SIGMOID LOG DISP LIN SQRT
SHARED MONOCHROME COLOR_RANGE CHEMICAL SHIFT SPECTROSCOPY
BINARY FRACTIONAL PROBABILITY OCCUPANCY LABELMAP TILED_FULL TILED_SPARSE
CLOSED_PLANAR CLOSEDPLANAR_XOR POINT OPEN_PLANAR OPEN_NONPLANAR POINTS LINES LINE SURFACE
ORGAN PTV CTV GTV EXTERNAL CAVITY AVOIDANCE SUPPORT FIXATION MARKER REGISTRATION ISOCENTER CONTRAST_AGENT BOLUS TREATED_VOLUME
IRRAD_VOLUME CONTROL DOSE_REGION BRACHY_CHANNEL DOSE_MEASUREMENT APPROVED UNAPPROVED REJECTED
BEAM PHYSICAL EFFECTIVE ERROR GY RELATIVE DOSE PLAN MULTI_PLAN FRACTION
CONSTANT_ANGLE SPIRAL HELICAL SEQUENCED SEQ STEPPING STATIONARY FREE CW CCW SCAN MODE NORMAL CINE_MODE
2D 3D 4D CARTESIAN RADIAL RECTILINEAR UNIFORM TISSUE BLOOD MUSCLE BONE SOFT AIR STANDARD SHARP SMOOTH DETAIL EDGE
DIRECTIONAL ISOTROPIC BIPOLAR UNIPOLAR LOW HIGH FIRST SECOND THIRD GENERAL
DRY WET RAW PROCESSED PRESENTATION FOR_PRESENTATION FOR PROCESSING QUALITY_CONTROL PRODUCT RESEARCH SERVICE
ATTN SCAT DECY DTIM MOTN PMOT CLN RAN RADL DCAL NORM SENS EMISSION TRANSMISSION TRANSITION RESPIRATORY CARDIAC GATE LIST SCINTIGRAPHY
START ADMIN NOEXP SINGH DLYD 1PS 2PS
ALTERED UNALTERED
LOSSY LOSSLESS 00 01 ISO_10918_1 ISO_14495_1 ISO_15444_1 ISO_13818_2 ISO_14496_10
PLANAR FRAME FRAMES IMAGE IMAGES SERIES STUDY PATIENT REFERENCE GEOMETRY TABLE TUBE DETECTOR XRAY X RAY ENERGY DIRECT SCINTILLATOR STORAGE FILM
CONVERTED DIGITIZED WSD WSI DV DI DF SYN DRW SI VIDEO SCREEN CAPTURE DISPLAY ROTATING ANODE TUNGSTEN MOLYBDENUM RHODIUM SILVER ALUMINUM COPPER
FIXED MOVING GRID RECIPROCATING PARALLEL CROSSED FOCUSED STRIP WEDGE BUTTERFLY FLAT SHAPE COLLIMATOR CYLINDRICAL RING RECTANGULAR CIRCULAR
POLYGONAL HEXAGONAL SQUARE PULSED CONTINUOUS BREATH HOLD EXPIRATION INSPIRATION SYSTOLE DIASTOLE TRIGGER TRIGGERED RETROSPECTIVE PROSPECTIVE
BODY_MASS ABDOMINAL INTERLEAVED STEREO LEADING TRAILING CORONAL SAGITTAL TRANSVERSE OBLIQUE FEET
TRANSVERSE_PLANE SMPTE ISOTROPICALLY COMPLEX NUMBER COUNTS UNIT CALIBRATED EXTENDED BASIC UNSPECIFIED VARIABLE CONSTANT PASSIVE ACTIVE
"""

TERMS = frozenset(_TERMS.split())
_VENDORS = (
    "SIEMENS", "GE MEDICAL SYSTEMS", "GE HEALTHCARE", "PHILIPS", "TOSHIBA", "CANON", "HITACHI", "FUJIFILM", "AGFA", "KODAK",
    "CARESTREAM", "HOLOGIC", "SAMSUNG", "MINDRAY", "UIH", "SHIMADZU", "ELSCINT", "MARCONI", "PICKER", "KONICA MINOLTA",
    "ACUSON", "ESAOTE", "ZIEHM", "NEUSOFT", "VARIAN", "ELEKTA", "ACCURAY", "BRUKER", "ALOKA", "LORAD", "FISCHER", "SECTRA",
)  # fmt: skip
_MESSAGES = """
the of not is or in its be can no and that it are to this with another one for as without an from than at has by again what none
out was were which same each have than more all other into only if so but between below above before after most them they
expected found read missing missing given made left used taken kept written ordered moved set sets cut known unknown named
file files folder folders name names path dataset datasets data archive source sources input inputs output outputs info
image images imagesTr imagesTs labelsTr labelsTs img imgs mask masks label labels seg segs segmentation segmentations
annotation annotations annotator annotators class classes case cases series study studies scan scans volume volumes
slice slices frame frames voxel voxels pixel pixels value values number numbers shape spacing size sizes type types
affine axis axes origin direction directions orientation position positions geometry dimension dimensions channel channels
header headers region regions contour contours segment segments structure structures object objects instance instances
train training val validation test split splits version versions task background foreground subject subjects patient
patients session sessions sample samples record records shard shards manifest key keys table list row rows column columns
intensity modality resolution unit units stack plane planes space gap distance grid mosaic tiles window crop truncated
damaged supported compressed encoding whole empty text raw bytes nifti dicom nrrd json csv zip tar mr ct pt us hu mm ms
DICOM DICOMDIR NIfTI NRRD SEG RTSTRUCT RT JSON CSV ZIP TAR XML CT MR PT PET US CR DX MG NM XA HU UID UIDs IMAGE IMAGES MASK
MASKS LABEL LABELS DATA STUDY SERIES PatientID SeriesInstanceUID SOPInstanceUID PixelSpacing SliceThickness
"""

MESSAGES = frozenset(_MESSAGES.split())
"""Words of our own messages that people also call files by, as they stand there. What is rather a name of people is not one of them."""

FILES = frozenset({"labels.csv", "cases.csv", "dataset.json"})
"""Files that go by these names in every archive: they are shown."""

MODALITIES = frozenset(
    ["ANN", "AR", "ASMT", "AU", "BDUS", "BI", "BMD", "CFM", "CR", "CT", "CTPROTOCOL", "DG", "DMS", "DX", "ECG", "EEG", "EMG", "EOG", "EPS", "ES", "FID", "GM", "HC", "HD", "IO", "IOL", "IVOCT", "IVUS", "KER", "KO", "LEN", "LS", "M3D", "MG", "MR", "NM", "OAM", "OCT", "OP", "OPM", "OPT", "OPTBSV", "OPTENF", "OPV", "OSS", "OT", "PA", "PLAN", "POS", "PR", "PT", "PX", "REG", "RESP", "RF", "RG", "RTDOSE", "RTIMAGE", "RTINTENT", "RTPLAN", "RTRAD", "RTRECORD", "RTSEGANN", "RTSTRUCT", "RWV", "SEG", "SM", "SMR", "SR", "SRF", "STAIN", "TEXTUREMAP", "TG", "US", "VA", "XA", "XAPROTOCOL", "XC", "CS", "DD", "DF", "DS", "EC", "FA", "FS", "LP", "MA", "MS", "OPR", "ST", "VF"]
)
"""Defined terms of Modality, retired ones too (PS3.3 C.7.3.1.1.1)."""


def is_term(value: str) -> bool:
    """True for a code string of defined terms: the whole, or all its words, are known; short numbers count as words."""
    if value in TERMS:
        return True
    words = [word for word in re.split(r"[_ \-]+", value) if word]
    return bool(words) and all(word in TERMS or (word.isdigit() and len(word) <= 3) for word in words)


def vendor(value: str) -> str:
    """The maker of a machine in standard spelling, "" for a name that is not known."""
    upper = value.upper()
    return next((name for name in _VENDORS if name in upper), "GE MEDICAL SYSTEMS" if upper.strip() == "GE" else "")


@functools.cache
def concepts() -> dict[tuple[str, str], str]:
    """(coding scheme, code) -> meaning, of all context groups of PS3.16."""
    from pydicom.sr._concepts_dict import concepts as tables

    found = {}
    scheme: str
    keywords: dict[str, dict[str, tuple]]
    for scheme, keywords in tables.items():  # type: ignore[assignment]
        for codes in keywords.values():
            for code, (meaning, *_) in codes.items():
                found[scheme, code] = meaning
    return found


_BODY = re.compile(
    r"anatom|segment|region|structure|lesion|finding|tissue|organ\b|organs|lung|brain|heart|cardi|vessel|vascul|arter|vein|ven(ous|tric)|bone|joint|"
    r"muscle|nerve|abdom|pelvi|chest|thora|breast|lateral|modifier|morphol|neoplas|tumor|site|radiotherapy|\broi\b|kidney|renal|prostat|spine|skull|head|"
    r"neck|extrem|eye|ophthal|tooth|teeth|tract|lymph|valve|chamber|lobe",
    re.IGNORECASE,
)
"""Context groups of PS3.16 that name parts of the body, and what is found in them."""
_OTHER = re.compile(
    r"breed|registr|drug|agent|device|observ|stain|taxon|person|equipment|measur|method|procedure|fixat|report|score|scale|protocol|calculat|equation|"
    r"view|projection",
    re.IGNORECASE,
)
"""Those of breeds, people, makers and methods, which are full of names."""
_MORE = """
background lesion nodule tumor tumour tumors tumours mask organ left right upper lower middle lobe ball cyst cysts edema oedema necrosis core enhancing
whole vertebra vertebrae vertebral disc discs rib ribs scapula clavicula clavicle sternum sacrum costal cartilage cartilages humerus radius ulna femur
tibia fibula patella autochthon iliopsoas gluteus maximus medius minimus psoas quadratus lumborum esophagus oesophagus trachea duodenum colon rectum sigmoid
bowel small large gallbladder bladder urinary adrenal gland glands thyroid parotid submandibular mandible maxilla cochlea chiasm brainstem lens orbit
penile bulb seminal vesicle vesicles prostate uterus ovary cervix vena cava superior inferior portal splenic hepatic iliac artery arteries vein veins trunk
brachiocephalic subclavian carotid common internal external pulmonary coronary atrium ventricle myocardium appendage septum hippocampus anterior posterior
amygdala thalamus caudate putamen pallidum accumbens cortex white gray grey matter fluid cerebrospinal ventricles cerebellum lung lungs airway airways
emphysema consolidation opacity ground glass effusion pneumothorax bronchus bronchi node nodes lymph body bone bones skin fat muscle muscles spinal cord
canal nerve nerves optic eye eyes head neck chest abdomen pelvis arm arms leg legs hand hands foot feet spleen liver kidney kidneys pancreas stomach heart
aorta brain skull polyp calcification calcifications hemorrhage haemorrhage infarct ischemia stroke plaque aneurysm thrombus metastasis metastases
and of in the with without all any other
"""
_PEOPLE = frozenset(
    ["achilles", "becquerel", "becquerels", "blalock", "boyd", "cockett", "cooper", "couinaud", "damus", "dodd", "doppler", "ewing", "fallot", "fleischner", "fontan", "giacomini", "glenn", "gross", "hounsfield", "hunter", "hunterian", "james", "janma", "joslin", "kaye", "kerley", "kutta", "levine", "lown", "merkel", "meyer", "mobitz", "mustard", "norwood", "paget", "parkinson", "purkinje", "rastelli", "runge", "euler", "sano", "senning", "stansel", "student", "taussig", "todaro", "trendelenburg", "valsalva", "wenckebach", "willis", "wolf", "wood", "baum", "fisher", "weber", "klein", "lange", "hertz"]
)
"""Eponyms, which are names of people still."""


@functools.cache
def _words() -> frozenset[str]:
    """Words of the meanings of parts and findings of the body, and of defined terms, in lower case."""
    from pydicom.sr._cid_dict import cid_concepts, name_for_cid
    from pydicom.sr._concepts_dict import concepts

    tables: dict[str, dict[str, dict[str, tuple]]] = concepts  # type: ignore[assignment]
    found = set(re.findall(r"[a-z]{2,}", (" ".join(TERMS).replace("_", " ") + _MORE).lower()))
    for group, name in name_for_cid.items():
        if not _BODY.search(name) or _OTHER.search(name):
            continue
        for scheme, keywords in cid_concepts[group].items():
            for keyword in keywords:
                for meaning, *_ in tables.get(scheme, {}).get(keyword, {}).values():
                    found.update(re.findall(r"[a-z]{2,}(?!'s)\b", meaning.lower()))
    return frozenset(found - _PEOPLE)


NAMING = (
    "PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName", "ReferringPhysicianName", "PerformingPhysicianName",
    "OperatorsName", "PhysiciansOfRecord", "NameOfPhysiciansReadingStudy", "RequestingPhysician", "ContentCreatorName", "PatientID", "OtherPatientIDs",
    "AccessionNumber", "StudyID", "InstitutionName", "PatientAddress", "PatientTelephoneNumbers", "ReviewerName",
)  # fmt: skip
"""Keywords of attributes that name or number somebody."""
_MOST_DIGITS = 3


def naming_words(texts: Iterable[str]) -> frozenset[str]:
    """Words of three letters and more, in upper case, of texts that name or number somebody. Pure."""
    text = " ".join(texts).upper().replace("^", " ").replace("_", " ")
    return frozenset(word for word in re.findall(r"\w+", text) if len(word) > 2)


def names_somebody(value: str, forbidden: Collection[str]) -> bool:
    """True if a word, or all the digits, of ``value`` stand among ``forbidden``. Pure."""
    words = {word for pattern in (r"[^\W_]+", r"[^\W\d_]+") for word in re.findall(pattern, value.upper())}
    digits = re.sub(r"\D", "", value)
    return bool(words & set(forbidden)) or (len(digits) > 1 and digits.lstrip("0") in {word.lstrip("0") for word in forbidden if word.isdigit()})


def label(key: bytes, value: str, forbidden: Collection[str] = ()) -> str:
    """The name of a segment or contour: kept if all its words are terms of medicine, else ``label-<8 hex>``.

    Equal names get equal labels, so that classes stay classes. Of digits few are kept: a number can be a patient's.

    Args:
        forbidden: words in upper case that name somebody in the same object.
    """
    words = re.findall(r"[^\W\d_]+|\d+|[^\w\s]", value)
    plain = all(
        (word.isdigit() and len(word) <= 2) or word in tuple("-_+()/.,") or len(word) == 1 or word.lower() in _words() for word in words
    ) and not names_somebody(value, forbidden)
    singles = sum(len(word) == 1 and word.isalpha() for word in words)
    few = singles <= 1 and sum(letter.isdigit() for letter in value) <= _MOST_DIGITS and len(value) <= 64
    if words and plain and few and value.isascii() and value.isprintable() and any(word.isalpha() for word in words):
        return value.strip()
    code = hmac.new(key, f"label\0{value.strip().casefold()}".encode(errors="surrogatepass"), hashlib.sha256)
    return f"label-{code.hexdigest()[:8]}"


def modality(value: str) -> str:
    """A Modality (0008,0060) that the standard defines, "OT" for any other, "" for none: nothing keeps a site from writing a name into it."""
    value = value.strip().upper()
    return value if value in MODALITIES or not value else "OT"


def code(value: str) -> str:
    """A code as ``scheme:value`` if the standard lists it, "" for any other, whose value can be anything."""
    scheme, _, text = value.partition(":")
    return value if (scheme, text) in concepts() else ""
