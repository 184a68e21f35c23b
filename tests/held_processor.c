/* Makes the programs it is loaded into see a smaller processor, so that numeric libraries take the kernels that they would take
   there, at full speed:

     cc -O2 -shared -fPIC -o held.so tests/held_processor.c -ldl
     HVD_HOLD_TO=avx2 LD_PRELOAD=$PWD/held.so python -m pytest tests/single/test_golden.py

   HVD_HOLD_TO: avx2 (the default; no AVX-512, no VNNI, no AMX), avx512 (no VNNI, no AMX), vnni (AVX-512 VNNI, no AMX).

   The kernel lets the instruction CPUID trap (arch_prctl, Linux on x86-64; not every processor and sandbox can), and the trap is
   answered here with bits taken away (Intel SDM, volume 2A, CPUID, leaf 7). /proc/cpuinfo still shows the whole processor. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(n) (1u << (n))
#define ARCH_SET_CPUID 0x1012

typedef int (*sigaction_t)(int, const struct sigaction *, struct sigaction *);

static sigaction_t real_sigaction;
static struct sigaction others; /* what the program wants done with other faults */
static int holding;
static enum { AVX2, AVX512, VNNI } level;

static long allow_cpuid(long on) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, on); }

static void take_away(uint32_t leaf, uint32_t sub, uint32_t *a, uint32_t *b, uint32_t *c, uint32_t *d) {
    if (leaf != 7) return;
    if (sub == 0) {
        *d &= ~(BIT(22) | BIT(24) | BIT(25)); /* AMX: bf16, tile, int8 */
        if (level <= AVX512) *c &= ~BIT(11);  /* AVX512_VNNI */
        if (level == AVX2) {
            *b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));    /* AVX512 F DQ IFMA PF ER CD BW VL */
            *c &= ~(BIT(1) | BIT(6) | BIT(8) | BIT(9) | BIT(10) | BIT(12) | BIT(14)); /* VBMI VBMI2 GFNI VAES VPCLMULQDQ BITALG VPOPCNTDQ */
            *d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(23));                              /* 4VNNIW 4FMAPS VP2INTERSECT FP16 */
        }
    } else if (sub == 1) {
        *d &= ~(BIT(4) | BIT(8) | BIT(10) | BIT(19)); /* AVX-VNNI-INT8, AMX-COMPLEX, AVX-VNNI-INT16, AVX10 */
        if (level <= AVX512) *a &= ~BIT(4);           /* AVX-VNNI */
        if (level == AVX2) *a &= ~(BIT(5) | BIT(23)); /* AVX512_BF16, AVX-IFMA */
    }
}

static void on_fault(int number, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *at = (const uint8_t *)r[REG_RIP];
    if (info->si_code == SI_KERNEL && at[0] == 0x0f && at[1] == 0xa2) {
        uint32_t a = (uint32_t)r[REG_RAX], c = (uint32_t)r[REG_RCX], leaf = a, sub = c, b, d;
        allow_cpuid(1);
        __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        allow_cpuid(0);
        take_away(leaf, sub, &a, &b, &c, &d);
        r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d, r[REG_RIP] += 2;
    } else if ((others.sa_flags & SA_SIGINFO) && others.sa_sigaction) {
        others.sa_sigaction(number, info, context);
    } else if (!(others.sa_flags & SA_SIGINFO) && others.sa_handler != SIG_DFL && others.sa_handler != SIG_IGN) {
        others.sa_handler(number);
    } else {
        struct sigaction usual;
        memset(&usual, 0, sizeof usual);
        usual.sa_handler = SIG_DFL;
        real_sigaction(SIGSEGV, &usual, NULL); /* faults again, and ends the program */
    }
}

int sigaction(int number, const struct sigaction *wanted, struct sigaction *before) {
    if (!real_sigaction) real_sigaction = (sigaction_t)dlsym(RTLD_NEXT, "sigaction");
    if (number != SIGSEGV || !holding) return real_sigaction(number, wanted, before);
    if (before) *before = others;
    if (wanted) others = *wanted;
    return 0;
}

__attribute__((constructor)) static void hold(void) {
    const char *asked = getenv("HVD_HOLD_TO");
    struct sigaction mine;
    level = asked && !strcmp(asked, "vnni") ? VNNI : asked && !strcmp(asked, "avx512") ? AVX512 : AVX2;
    if (!real_sigaction) real_sigaction = (sigaction_t)dlsym(RTLD_NEXT, "sigaction");
    memset(&mine, 0, sizeof mine);
    mine.sa_sigaction = on_fault;
    mine.sa_flags = SA_SIGINFO | SA_NODEFER;
    if (real_sigaction(SIGSEGV, &mine, &others) == 0 && allow_cpuid(0) == 0) holding = 1;
    else real_sigaction(SIGSEGV, &others, NULL);
}
