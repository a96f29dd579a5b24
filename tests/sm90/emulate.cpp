// The sm90 kernels on a CPU, behind the interface of benches/sm90/host.cu, so that `run.py check` checks them without a GPU.
#include "../../backends/sm90/params.h"

#include <cstdio>
#include <cstdlib>
#include <map>

#include "../../backends/sm90/ptx.h"
#include "../../backends/sm90/wgmma.h"
#include "../simt/fiber.h"

namespace polymla {
// Dynamic shared memory of the first CTA of a cluster; declared by the kernels.
alignas(1024) thread_local char smem_raw[232448];
static char second_cta[232448] __attribute__((aligned(1024)));

#define STEPS(ELEM)                                                                                                              \
    template <> void qk_step<ELEM>(float (&d)[32], const u32 (&a)[4], Desc k, int accumulate) {                                  \
        emulated::issue({d, 64, accumulate, is_f16<ELEM>, 0, 0, 0, 0, k.low, k.high, {a[0], a[1], a[2], a[3]}});                  \
    }                                                                                                                            \
    template <> void qk_step_shared<ELEM>(float (&d)[32], Desc q, Desc k) {                                                      \
        emulated::issue({d, 64, 1, is_f16<ELEM>, 0, 0, q.low, q.high, k.low, k.high, {}});                                       \
    }                                                                                                                            \
    template <> void pv_step<ELEM>(float (&d)[64], Desc p, Desc v, int accumulate) {                                             \
        emulated::issue({d, 128, accumulate, is_f16<ELEM>, 0, 1, p.low, p.high, v.low, v.high, {}});                             \
    }                    \
    template <> void few_qk_step<ELEM>(float (&d)[8], Desc k, Desc q, int accumulate) {                                          \
        emulated::issue({d, 16, accumulate, is_f16<ELEM>, 0, 0, k.low, k.high, q.low, q.high, {}});                              \
    }                                                                                                                            \
    template <> void few_pv_step<ELEM>(float (&d)[8], Desc v, Desc p) {                                                          \
        emulated::issue({d, 16, 1, is_f16<ELEM>, 1, 0, v.low, v.high, p.low, p.high, {}});                                       \
    }
STEPS(Bf16)
STEPS(F16)
}  // namespace polymla

#include "../../backends/sm90/decode.cu"
#include "../../backends/sm90/combine.cu"
#include "../../backends/sm90/schedule.cu"

namespace emulated {
namespace {

constexpr size_t STACK = 192 * 1024;
constexpr u32 SHARED = 232448;

struct Fiber : simt::FiberStack {
    dim index;
    u32 cta;
    const void* blocked;        // what it waits for, for the report
    std::vector<Product> unissued;
    u32 issued;
};
struct Bar { u32 count = 0, pending = 0, parity = 0; i64 bytes = 0; std::vector<int> waiting; };
struct Meeting { u32 arrived = 0, expected = 0, turn = 0; bool any = false, result[2]; std::vector<int> waiting; };
struct Warp { u32 arrived = 0, turn = 0; char mine[2][32][32]; u32 bytes; std::vector<int> waiting; };
struct Group { u32 arrived = 0; const Product* each[128]; std::vector<int> waiting; };
struct Cta {
    dim block;
    char* shared;
    std::map<u32, Bar> bars;
    Meeting meetings[16];
    Warp warps[16];
    Group groups[4];
};
struct Map { const char* base; int rank, rows; u64 dims[5]; i64 strides[5]; };     // bytes
struct Box { u32 dst, bar, cta; Map map; int c[4]; };

std::vector<Fiber> fibers;
std::vector<int> ready;
std::vector<Cta> ctas;
std::vector<Box> boxes;
Meeting cluster;
dim grid_size;
int current;
u32 finished;
uint64_t random_state = 88172645463325252ull, early, landing;
u32 slowness[2][4];
jmp_buf scheduler;
void (*kernel)(const void*);
const void* arguments;

uint64_t next() { return simt::next_random(random_state); }
Fiber& me() { return fibers[current]; }
Cta& mine() { return ctas[me().cta]; }
[[noreturn]] void die(const char* what, u32 x = 0, u32 y = 0) {
    std::fprintf(stderr, "emulated: %s (%u, %u): CTA %u %u %u, thread %u\n", what, x, y, mine().block.x, mine().block.y, mine().block.z,
                 me().index.x);
    std::abort();
}
void leave() { me().leave(scheduler); }
void wake(std::vector<int>& waiting) {
    ready.insert(ready.end(), waiting.begin(), waiting.end());
    waiting.clear();
}
void entry() {
    kernel(arguments);
    if (!me().unissued.empty()) die("a thread ended with products that nobody waited for");
    me().done = true;
    ++finished;
    _longjmp(scheduler, 1);
}
void settle(Bar& b) {
    if (b.pending > 0 || b.bytes != 0) return;
    b.pending = b.count;
    b.parity ^= 1;
    wake(b.waiting);
}
Bar& bar_at(u32 at) {
    Cta& c = at >> 24 ? ctas.at((at >> 24) - 1) : mine();
    auto found = c.bars.find(at & 0xffffff);
    if (found == c.bars.end()) die("no barrier here", at);
    return found->second;
}
char* in_cta(u32 cta, u32 addr, u32 bytes) {
    if (addr > SHARED || bytes > SHARED - addr) die("outside shared memory", addr, bytes);
    return ctas[cta].shared + addr;
}
// Swizzle: the 16-byte unit of an address is changed by its row's.
u32 swizzled(u32 a) { return a ^ (a >> 7 & 7) << 4; }
void land(const Box& b) {
    bool inside = true;
    for (int i = 2; i < b.map.rank; ++i) inside &= b.c[i - 1] >= 0 && u64(b.c[i - 1]) < b.map.dims[i];
    for (int r = 0; r < b.map.rows; ++r) {
        const bool row = inside && b.c[0] + r >= 0 && u64(b.c[0] + r) < b.map.dims[1];
        const char* src = b.map.base + (b.c[0] + r) * b.map.strides[1];
        for (int i = 2; i < b.map.rank; ++i) src += b.c[i - 1] * b.map.strides[i];
        for (u32 u = 0; u < 8; ++u) {
            char* to = in_cta(b.cta, swizzled(b.dst + u32(r) * 128 + u * 16), 16);
            if (row) std::memcpy(to, src + u * 16, 16); else std::memset(to, 0, 16);
        }
    }
    auto bar = ctas[b.cta].bars.find(b.bar);
    if (bar == ctas[b.cta].bars.end()) die("a box lands on no barrier", b.bar);
    bar->second.bytes -= b.map.rows * 128;
    settle(bar->second);
}
void land_one() {
    const size_t i = next() % boxes.size();
    const Box b = boxes[i];
    boxes[i] = boxes.back();
    boxes.pop_back();
    land(b);
}
void run() {
    finished = 0;
    ready.clear();
    for (size_t i = 0; i < fibers.size(); ++i) fibers[i].started = fibers[i].done = false, ready.push_back(int(i));
    _setjmp(scheduler);
    while (finished < fibers.size()) {
        if (!boxes.empty() && (ready.empty() || next() % landing == 0)) { land_one(); continue; }
        if (ready.empty()) {
            const void* last = &fibers;
            for (const Fiber& f : fibers) {
                if (!f.done && f.blocked != last)
                    std::fprintf(stderr, "  CTA %u (%u %u %u) thread %u and on wait for %p\n", f.cta, ctas[f.cta].block.x, ctas[f.cta].block.y,
                                 ctas[f.cta].block.z, f.index.x, f.blocked);
                last = f.done ? &fibers : f.blocked;
            }
            std::fprintf(stderr, "emulated: %zu of %zu threads wait for ever\n", fibers.size() - finished, fibers.size());
            std::abort();
        }
        current = simt::take_any(ready, random_state);
        if (next() % slowness[me().cta][me().index.x / 128] != 0) { ready.push_back(current); continue; }
        me().resume(STACK, entry);
    }
}
void launch(dim grid, u32 threads, u32 in_cluster, void (*k)(const void*), const void* args) {
    kernel = k, arguments = args, grid_size = grid;
    const u32 total = threads * in_cluster;
    if (fibers.size() != total) fibers = std::vector<Fiber>(total);
    for (u32 z = 0; z < grid.z; ++z)
        for (u32 y = 0; y < grid.y; ++y)
            for (u32 x = 0; x < grid.x; x += in_cluster) {
                ctas = std::vector<Cta>(in_cluster);
                cluster = Meeting();
                early = next();
                // Boxes land at once, or only when nobody can go on without.
                landing = 64ull << next() % 5 * 3;
                // Some roles are much slower than others, as caches and fetching make them on a device.
                for (auto& cta : slowness)
                    for (u32& s : cta) s = next() % 2 ? 1 : 1u << next() % 8;
                for (u32 c = 0; c < in_cluster; ++c) {
                    ctas[c].block = {x + c, y, z};
                    ctas[c].shared = c ? polymla::second_cta : polymla::smem_raw;
                    std::memset(ctas[c].shared, 0xff, SHARED);
                    for (u32 t = 0; t < threads; ++t) {
                        Fiber& f = fibers[c * threads + t];
                        f.index = {t, 0, 0}, f.cta = c, f.blocked = nullptr, f.issued = 0;
                        f.unissued.clear();
                    }
                }
                run();
            }
}
void wait_on(std::vector<int>& waiting, const void* what) {
    me().blocked = what;
    waiting.push_back(current);
    leave();
}

// Decodes 16 columns of `rows` rows of an operand.
void operand(float* to, int rows, u32 low, u32 high, int transposed, int f16) {
    const u32 addr = (low & 0x3fff) << 4, lbo = (low >> 16) << 4, sbo = (high & 0x3fff) << 4, mode = high >> 30;
    if (mode != 0 && mode != 1) die("a descriptor of another swizzle", low, high);
    for (int r = 0; r < rows; ++r)
        for (int k = 0; k < 16; ++k) {
            u32 a = addr;
            if (transposed) a += u32(r / 64) * lbo + u32(k / 8) * sbo + u32(k % 8) * 128 + u32(r % 64) * 2;
            else if (mode == 1) a += u32(r / 8) * sbo + u32(r % 8) * 128 + u32(k) * 2;
            else a += u32(r / 8) * sbo + u32(k / 8) * lbo + u32(r % 8) * 16 + u32(k % 8) * 2;
            if (mode == 1) a = swizzled(a);
            u16 v;
            std::memcpy(&v, in_cta(me().cta, a, 2), 2);
            to[r * 16 + k] = f16 ? from_f16(v) : float_of(u32(v) << 16);
        }
}
void multiply(const Product* const* each) {
    static float a[64 * 16], b[256 * 16];
    const Product& p = *each[0];
    for (int i = 1; i < 128; ++i)
        if (each[i]->b_low != p.b_low || each[i]->a_low != p.a_low || each[i]->n != p.n || each[i]->accumulate != p.accumulate)
            die("threads of a warpgroup issue different products", p.b_low, each[i]->b_low);
    if (p.a_high) operand(a, 64, p.a_low, p.a_high, p.a_transposed, p.f16);
    else
        for (int t = 0; t < 128; ++t)
            for (int i = 0; i < 4; ++i)
                for (int k = 0; k < 2; ++k) {
                    const u16 v = u16(each[t]->a[i] >> 16 * k);
                    a[(t / 32 * 16 + t % 32 / 4 + i % 2 * 8) * 16 + t % 4 * 2 + k + i / 2 * 8] = p.f16 ? from_f16(v) : float_of(u32(v) << 16);
                }
    operand(b, p.n, p.b_low, p.b_high, p.b_transposed, p.f16);
    for (int t = 0; t < 128; ++t)
        for (int i = 0; i < p.n / 2; ++i) {
            const int row = t / 32 * 16 + t % 32 / 4 + (i & 2 ? 8 : 0), column = i / 4 * 8 + t % 4 * 2 + (i & 1);
            float sum = p.accumulate ? each[t]->d[i] : 0.0f;
            for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[column * 16 + k];
            each[t]->d[i] = sum;
        }
}
// All threads of the warpgroup have come with their oldest product.
void together(const Product& p) {
    Group& g = mine().groups[me().index.x / 128];
    g.each[me().index.x % 128] = &p;
    if (++g.arrived == 128) {
        g.arrived = 0;
        multiply(g.each);
        wake(g.waiting);
    } else {
        wait_on(g.waiting, &g);
    }
}

}  // namespace

const dim& thread_index() { return me().index; }
const dim& block_index() { return mine().block; }
const dim& grid() { return grid_size; }
u32 cluster_ctas() { return u32(ctas.size()); }
u32 rank() { return me().cta; }
char* shared(u32 addr, u32 bytes) { return in_cta(me().cta, addr, bytes); }
u32 address_of(const void* p) { return u32(static_cast<const char*>(p) - polymla::smem_raw); }
void init(u32 bar, u32 count) {
    if (mine().bars.count(bar)) die("a barrier is initialised twice", bar);
    Bar& b = mine().bars[bar];
    b.count = b.pending = count;
}
void arrive(u32 at, u32 expect) {
    Bar& b = bar_at(at);
    if (b.pending == 0) die("more arrivals than a barrier counts", at & 0xffffff);
    b.bytes += expect;
    --b.pending;
    settle(b);
}
bool complete(u32 at, u32 parity) { return bar_at(at).parity != (parity & 1); }
void wait(u32 at, u32 parity) {
    while (!complete(at, parity)) wait_on(bar_at(at).waiting, reinterpret_cast<const void*>(size_t(at)));
}
bool barrier_or(u32 id, u32 threads, bool value) {
    Meeting& m = mine().meetings[id];
    if (threads == 0) threads = u32(fibers.size() / ctas.size());
    if (m.arrived == 0) m.expected = threads, m.any = false;
    if (m.expected != threads) die("a named barrier with other numbers of threads", id, threads);
    m.any |= value;
    const u32 turn = m.turn;
    if (++m.arrived == m.expected) {
        m.result[turn & 1] = m.any;
        m.arrived = 0;
        ++m.turn;
        wake(m.waiting);
    } else {
        wait_on(m.waiting, &m);
    }
    return m.result[turn & 1];
}
void barrier(u32 id, u32 threads) { barrier_or(id, threads, false); }
void cluster_barrier() {
    if (++cluster.arrived == fibers.size()) {
        cluster.arrived = 0;
        wake(cluster.waiting);
    } else {
        wait_on(cluster.waiting, &cluster);
    }
}
const void* exchange(const void* value, u32 bytes) {
    Warp& w = mine().warps[me().index.x / 32];
    const u32 turn = w.turn & 1;
    if (w.arrived == 0) w.bytes = bytes;
    if (w.bytes != bytes || bytes > 32) die("lanes of a warp do different things", w.bytes, bytes);
    // Packed by their own size, so that the result is an array.
    std::memcpy(&w.mine[turn][0][0] + me().index.x % 32 * bytes, value, bytes);
    if (++w.arrived == 32) {
        w.arrived = 0;
        ++w.turn;
        wake(w.waiting);
    } else {
        wait_on(w.waiting, &w);
    }
    return &w.mine[turn][0][0];
}
void load_box(u32 dst, const polymla::TensorMap* map, u32 bar, int c1, int c2, int c3, int c4, u32 mask) {
    Box b = {dst, bar, 0, *reinterpret_cast<const Map*>(map), {c1, c2, c3, c4}};
    if (dst % 128 != 0) die("a box at an address that the swizzle does not allow", dst);
    for (u32 c = 0; c < ctas.size(); ++c) {
        if (mask ? !(mask >> c & 1) : c != me().cta) continue;
        b.cta = c;
        for (int r = 0; r < b.map.rows; ++r) std::memset(in_cta(c, dst + u32(r) * 128, 128), 0xff, 128);
        boxes.push_back(b);
    }
}
void issue(const Product& p) {
    me().unissued.push_back(p);
    // At once or when it is waited for; all threads of a warpgroup count alike. An operand in registers may change after this.
    const bool now = (++me().issued * 2654435761u ^ u32(early)) >> 7 & 1;
    if (p.a_high == 0 || now) products_done();
}
void products_done() {
    // All of them in order; sooner or later is the same for whoever waits.
    std::vector<Product> all;
    all.swap(me().unissued);
    for (const Product& p : all) together(p);
}

}  // namespace emulated

// ---- the interface of host.cu ----------------------------------------------------------------------------------

using namespace polymla;
namespace {
struct Arguments { const DecodeParams* p; const TensorMap* maps; };
template <class Elem, bool ROPE, Form FORM>
void decode_entry(const void* x) {
    const Arguments& a = *static_cast<const Arguments*>(x);
    decode<Elem, ROPE, FORM>(*a.p, &a.maps[0], &a.maps[1], &a.maps[2], &a.maps[3]);
}
template <class Elem>
void combine_entry(const void* x) { combine<Elem>(*static_cast<const DecodeParams*>(x)); }
void schedule_entry(const void* x) { polymla_schedule(*static_cast<const ScheduleParams*>(x)); }

#define FORMS(ELEM, ROPE) {decode_entry<ELEM, ROPE, TMA>, decode_entry<ELEM, ROPE, GATHERED>, decode_entry<ELEM, ROPE, FEW_ROWS>}
void (*const DECODE[2][2][3])(const void*) = {{FORMS(Bf16, false), FORMS(Bf16, true)}, {FORMS(F16, false), FORMS(F16, true)}};

// (64 columns, then `dims`), strides in elements.
void encode(TensorMap* map, const void* base, int rows, std::vector<u64> dims, std::vector<i64> strides) {
    emulated::Map m = {static_cast<const char*>(base), int(dims.size()), rows, {}, {}};
    for (size_t i = 0; i < dims.size(); ++i) m.dims[i] = dims[i], m.strides[i] = i ? strides[i - 1] * 2 : 2;
    static_assert(sizeof m <= sizeof(TensorMap), "a map");
    std::memcpy(map, &m, sizeof m);
}
}  // namespace

extern "C" int pm_init() { return 0; }
extern "C" void pm_seed(unsigned long long seed) { emulated::random_state = seed * 2 + 1; }
extern "C" int pm_sizes(int* decode, int* schedule) {
    *decode = sizeof(DecodeParams);
    *schedule = sizeof(ScheduleParams);
    return Smem::total;
}
extern "C" int pm_maps(const DecodeParams* p, int, int rope, TensorMap* maps) {
    typedef u64 U;
    const int rows = p->page_size < 64 ? p->page_size : 64;
    encode(&maps[0], p->ckv, rows, {64, U(p->page_size), 8, U(p->h_kv), U(p->num_pages)},
           {p->ckv_stride_token, 64, p->ckv_stride_head, p->ckv_stride_page});
    encode(&maps[2], p->q_nope, p->q_box_rows, {64, U(p->h_q), 8, U(p->s_q), U(p->b)},
           {p->q_nope_stride_h, 64, p->q_nope_stride_s, p->q_nope_stride_b});
    if (!rope) return 0;
    encode(&maps[1], p->kpe, rows, {64, U(p->page_size), U(p->h_kv), U(p->num_pages)},
           {p->kpe_stride_token, p->kpe_stride_head, p->kpe_stride_page});
    encode(&maps[3], p->q_pe, p->q_box_rows, {64, U(p->h_q), U(p->s_q), U(p->b)}, {p->q_pe_stride_h, p->q_pe_stride_s, p->q_pe_stride_b});
    return 0;
}
extern "C" int pm_schedule(const ScheduleParams* p, void*) {
    emulated::launch({1, 1, 1}, 512, 1, schedule_entry, p);
    return 0;
}
extern "C" int pm_decode(const DecodeParams* p, const TensorMap* maps, int f16, int rope, int form, int combine_ctas, void*) {
    const Arguments a = {p, maps};
    emulated::launch({u32(p->m_tiles), u32(p->h_kv), u32(p->num_parts)}, 512, form == 0 && p->m_tiles % 2 == 0 ? 2 : 1, DECODE[f16][rope][form], &a);
    if (combine_ctas) emulated::launch({u32(combine_ctas), 1, 1}, 512, 1, f16 ? combine_entry<F16> : combine_entry<Bf16>, p);
    return 0;
}
