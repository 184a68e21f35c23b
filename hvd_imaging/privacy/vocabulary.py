"""Words that name nobody: defined terms of DICOM, makers of machines, terms of anatomy.

Code strings (VR CS) are meant for defined terms, but nothing keeps a site from writing a name into one. So what is kept
are words of this list; everything else leaves.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import re
from collections.abc import Collection

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

SCHEMES = frozenset({"DCM", "SCT", "SRT", "99SDM", "SNM3", "UCUM", "RADLEX", "LN", "FMA", "NCIt", "IBSI", "MDC", "UMLS"})


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


@functools.cache
def _words() -> frozenset[str]:
    """Words of all code meanings and defined terms, in lower case."""
    text = " ".join(concepts().values()) + " " + " ".join(TERMS).replace("_", " ")
    extra = "background lesion nodule tumor tumour mask organ left right upper lower lobe ball"
    return frozenset(re.findall(r"[a-z]{2,}", f"{text} {extra}".lower()))


def label(key: bytes, value: str, forbidden: Collection[str] = ()) -> str:
    """The name of a segment or contour: kept if all its words are terms of medicine, else ``label-<8 hex>``.

    Equal names get equal labels, so that classes stay classes.

    Args:
        forbidden: words in upper case that name somebody in the same object.
    """
    words = re.findall(r"[^\W\d_]+|\d+|[^\w\s]", value)
    plain = all(
        (word.isdigit() and len(word) <= 2)
        or word in tuple("-_+()/.,")
        or (word.upper() not in forbidden and (len(word) == 1 or word.lower() in _words()))
        for word in words
    )
    singles = sum(len(word) == 1 and word.isalpha() for word in words)
    if words and plain and singles <= 1 and value.isascii() and len(value) <= 64 and any(word.isalpha() for word in words):
        return value.strip()
    code = hmac.new(key, f"label\0{value.strip().casefold()}".encode(errors="surrogatepass"), hashlib.sha256)
    return f"label-{code.hexdigest()[:8]}"
