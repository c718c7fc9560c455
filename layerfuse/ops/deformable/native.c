/* Multi-scale deformable attention on the CPU, forward and backward: what `native.py` compiles at first use.
 *
 * Compiled once for each REAL, float or double. A unit of work is one head of one image (forward: or a part of its
 * queries). Its maps, whose rows lie a whole token apart, are copied next to each other as REALs, padded to whole
 * vectors, into memory of the thread: they stay in its cache, all types of value cost the same inner loop, and no two
 * threads ever add to one gradient, which is therefore the same each time. A row of zeros behind the maps stands for
 * all places outside, so that nothing branches. Letters are those of layerfuse/features.py.
 */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#ifndef REAL
#define REAL float
#endif
#define FLOOR(x) (sizeof(REAL) == 4 ? floorf(x) : floor(x))
#define INLINE static inline __attribute__((always_inline))
enum { LANES = 64 / sizeof(REAL) };

typedef REAL vec __attribute__((vector_size(64), may_alias));

typedef struct {
    const void *value, *grad_output;          /* (B, S, M, D), (B, Q, M*D) */
    const REAL *locations, *weights;          /* (B, Q, M, L, K, 2), (B, Q, M, L, K) */
    void *output;                             /* forward: (B, Q, M*D); backward: gradient of value, or NULL */
    REAL *grad_locations, *grad_weights;      /* backward: like locations and weights, or NULL */
    REAL *memory;                             /* `per_thread` REALs for each thread, in whole vectors */
    const int64_t *grids;                     /* L pairs H, W */
    int64_t per_thread, B, S, M, D, Q, L, K;
    int64_t parts;                            /* parts that the queries of a head are taken in */
    int64_t is_bfloat16;                      /* value, grad_output and output are bfloat16, else REAL */
    int64_t is_backward;
} Call;

typedef struct {                              /* some of the L*K points of a query */
    REAL width[LANES], height[LANES];         /* size of each point's grid, again as integers, and its first row */
    int32_t columns[LANES], lines[LANES], start[LANES];
    REAL place[2 * LANES], weight[LANES];     /* as given */
    REAL x[LANES], y[LANES];                  /* place within the cell */
    REAL factor[4][LANES];                    /* what each corner of the cell counts, with the weight */
    int32_t corner[4][LANES];                 /* its row */
} Points;

typedef struct {                              /* memory of one thread */
    vec *row, *maps, *grads;                  /* one row of D channels, S + 1 of them, and again; in whole vectors */
    Points *points;
} Memory;

INLINE int64_t vectors(int64_t count) { return (count + LANES - 1) / LANES; }

INLINE int64_t number_of_points(const Call *call, int64_t first) {
    int64_t left = call->L * call->K - first;
    return left < LANES ? left : LANES;
}

/* Number of REALs that a thread needs. */
int64_t memory_of_a_thread(const Call *call) {
    int64_t rows = (call->is_backward ? 2 : 1) * (call->S + 1) + 1;
    int64_t points = vectors(call->L * call->K) * vectors(sizeof(Points) / sizeof(REAL));
    return LANES * (rows * vectors(call->D) + points);
}

static Memory divide(const Call *call, REAL *memory) {
    int64_t depth = vectors(call->D), rows = call->S + 1, point = 0, start = 0;
    Memory part;
    part.row = (vec *)memory;
    part.maps = part.row + depth;
    part.grads = part.maps + rows * depth; /* backward only */
    part.points = (Points *)(part.maps + (call->is_backward ? 2 : 1) * rows * depth);
    memset(part.points, 0, vectors(call->L * call->K) * sizeof(Points));
    for (int64_t level = 0; level < call->L; level++) {
        int64_t height = call->grids[2 * level], width = call->grids[2 * level + 1];
        for (int64_t k = 0; k < call->K; k++, point++) {
            Points *points = part.points + point / LANES;
            int64_t lane = point % LANES;
            points->height[lane] = (REAL)height;
            points->width[lane] = (REAL)width;
            points->lines[lane] = (int32_t)height;
            points->columns[lane] = (int32_t)width;
            points->start[lane] = (int32_t)start;
        }
        start += height * width;
    }
    return part;
}

/* Copy D numbers of value's type, from element `at` on, to REALs. */
INLINE void load(REAL *to, const void *from, int64_t at, int64_t D, int is_bfloat16) {
    if (!is_bfloat16) {
        memcpy(to, (const REAL *)from + at, D * sizeof(REAL));
        return;
    }
    const uint16_t *halves = (const uint16_t *)from + at;
    for (int64_t i = 0; i < D; i++) {
        uint32_t bits = (uint32_t)halves[i] << 16;
        float number;
        memcpy(&number, &bits, 4);
        to[i] = (REAL)number;
    }
}

INLINE void store(void *to, int64_t at, const REAL *from, int64_t D, int is_bfloat16) {
    if (!is_bfloat16) {
        memcpy((REAL *)to + at, from, D * sizeof(REAL));
        return;
    }
    uint16_t *halves = (uint16_t *)to + at;
    for (int64_t i = 0; i < D; i++) {
        float number = (float)from[i];
        uint32_t bits;
        memcpy(&bits, &number, 4);
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even */
        halves[i] = (uint16_t)(number == number ? rounded : 0x7fc0);
    }
}

static void load_maps(const Call *call, Memory *part, int64_t image, int64_t head) {
    int64_t depth = vectors(call->D), D = call->D;
    for (int64_t s = 0; s < call->S; s++) {
        REAL *row = (REAL *)(part->maps + s * depth);
        load(row, call->value, ((image * call->S + s) * call->M + head) * D, D, (int)call->is_bfloat16);
        for (int64_t i = D; i < depth * LANES; i++) row[i] = 0;
    }
    memset(part->maps + call->S * depth, 0, depth * sizeof(vec));
}

/* Find the cells around points (x, y) in [0, 1] of each map, and what each corner counts; outside are zeros.
 * Written for compilers to turn into vectors: fixed lengths, no branch. */
INLINE void find_cells(Points *p, int32_t zeros) {
    for (int i = 0; i < LANES; i++) {
        REAL x = p->place[2 * i] * p->width[i] - (REAL)0.5, y = p->place[2 * i + 1] * p->height[i] - (REAL)0.5;
        REAL left = FLOOR(x), top = FLOOR(y), weight = p->weight[i];
        p->x[i] = x -= left; /* NaN stays NaN and shows in the output, as NaN times zero */
        p->y[i] = y -= top;
        p->factor[0][i] = (1 - y) * weight * (1 - x);
        p->factor[1][i] = (1 - y) * weight * x;
        p->factor[2][i] = y * weight * (1 - x);
        p->factor[3][i] = y * weight * x;
        left = left > -2 ? left : -2; /* NaN, too; then it is an integer that C can convert */
        left = left < p->width[i] ? left : p->width[i];
        top = top > -2 ? top : -2;
        top = top < p->height[i] ? top : p->height[i];
        int32_t column = (int32_t)left, line = (int32_t)top, columns = p->columns[i], lines = p->lines[i];
        int32_t row = p->start[i] + line * columns + column;
        int32_t west = (column >= 0) & (column < columns), east = (column >= -1) & (column < columns - 1);
        int32_t north = (line >= 0) & (line < lines), south = (line >= -1) & (line < lines - 1);
        p->corner[0][i] = north & west ? row : zeros;
        p->corner[1][i] = north & east ? row + 1 : zeros;
        p->corner[2][i] = south & west ? row + columns : zeros;
        p->corner[3][i] = south & east ? row + columns + 1 : zeros;
    }
}

/* Find the cells of all points of one head's query; `place` counts heads of queries of images. */
static void locate(const Call *call, Memory *part, int64_t place) {
    int64_t n = call->L * call->K;
    for (int64_t first = 0; first < n; first += LANES) {
        Points *points = part->points + first / LANES;
        int64_t count = number_of_points(call, first), at = place * n + first;
        memcpy(points->place, call->locations + 2 * at, 2 * count * sizeof(REAL));
        memcpy(points->weight, call->weights + at, count * sizeof(REAL));
        find_cells(points, (int32_t)call->S);
    }
}

/* Sum `count` vectors of channels, from `from` on, over all corners of all points; count is a constant. */
INLINE void attend(const Call *call, const Memory *part, int64_t depth, int64_t from, const int count) {
    const vec *maps = part->maps + from;
    vec sums[4] = {{0}};
    for (int64_t first = 0; first < call->L * call->K; first += LANES) {
        const Points *points = part->points + first / LANES;
        int64_t n = number_of_points(call, first);
        for (int64_t p = 0; p < n; p++) {
            const vec *a = maps + points->corner[0][p] * depth, *b = maps + points->corner[1][p] * depth;
            const vec *c = maps + points->corner[2][p] * depth, *d = maps + points->corner[3][p] * depth;
            for (int i = 0; i < count; i++) {
                sums[i] += points->factor[0][p] * a[i];
                sums[i] += points->factor[1][p] * b[i];
                sums[i] += points->factor[2][p] * c[i];
                sums[i] += points->factor[3][p] * d[i];
            }
        }
    }
    for (int i = 0; i < count; i++) part->row[from + i] = sums[i];
}

INLINE REAL total(vec numbers) {
    typedef REAL half_vec __attribute__((vector_size(32)));
    typedef REAL quarter_vec __attribute__((vector_size(16)));
    union { vec all; half_vec halves[2]; } whole = {numbers};
    union { half_vec all; quarter_vec quarters[2]; } half = {whole.halves[0] + whole.halves[1]};
    quarter_vec quarter = half.quarters[0] + half.quarters[1];
    REAL sum = 0;
    for (int i = 0; i < LANES / 4; i++) sum += quarter[i];
    return sum;
}

static void forward_unit(const Call *call, Memory *part, int64_t unit) {
    int64_t depth = vectors(call->D), pair = unit / call->parts, piece = unit % call->parts;
    int64_t image = pair / call->M, head = pair % call->M;
    load_maps(call, part, image, head);
    for (int64_t q = call->Q * piece / call->parts; q < call->Q * (piece + 1) / call->parts; q++) {
        int64_t place = (image * call->Q + q) * call->M + head, from = 0;
        locate(call, part, place);
        for (; from + 4 <= depth; from += 4) attend(call, part, depth, from, 4);
        for (; from < depth; from++) attend(call, part, depth, from, 1);
        store(call->output, place * call->D, (REAL *)part->row, call->D, (int)call->is_bfloat16);
    }
}

/* Scatter the gradient of one query to those of a point's corners, and return what each corner's row weighs in it. */
INLINE void pull_back(Memory *part, const Points *points, int64_t p, int64_t depth, int scatter, int read, REAL *dots) {
    const vec *row = part->row;
    for (int c = 0; c < 4; c++) {
        const vec *map = part->maps + points->corner[c][p] * depth;
        vec *grad = part->grads + points->corner[c][p] * depth, sum = {0};
        REAL factor = points->factor[c][p];
        for (int64_t i = 0; i < depth; i++) {
            if (read) sum += row[i] * map[i];
            if (scatter) grad[i] += factor * row[i];
        }
        dots[c] = read ? total(sum) : 0;
    }
}

INLINE void backward_query(const Call *call, Memory *part, int64_t place, int64_t depth, int scatter, int read) {
    int64_t n = call->L * call->K;
    locate(call, part, place);
    for (int64_t point = 0; point < n; point++) {
        const Points *points = part->points + point / LANES;
        int64_t p = point % LANES;
        REAL dots[4], x = points->x[p], y = points->y[p];
        pull_back(part, points, p, depth, scatter, read, dots);
        REAL upper = (1 - x) * dots[0] + x * dots[1], lower = (1 - x) * dots[2] + x * dots[3];
        REAL right = (1 - y) * (dots[1] - dots[0]) + y * (dots[3] - dots[2]);
        if (call->grad_weights) call->grad_weights[place * n + point] = (1 - y) * upper + y * lower;
        if (call->grad_locations) {
            call->grad_locations[2 * (place * n + point)] = points->width[p] * points->weight[p] * right;
            call->grad_locations[2 * (place * n + point) + 1] = points->height[p] * points->weight[p] * (lower - upper);
        }
    }
}

INLINE void backward_queries(const Call *call, Memory *part, int64_t image, int64_t head, int scatter, int read) {
    int64_t depth = vectors(call->D), D = call->D;
    memset(part->row, 0, depth * sizeof(vec));
    for (int64_t q = 0; q < call->Q; q++) {
        int64_t place = (image * call->Q + q) * call->M + head;
        load((REAL *)part->row, call->grad_output, place * D, D, (int)call->is_bfloat16);
        if (depth == 4) backward_query(call, part, place, 4, scatter, read);
        else backward_query(call, part, place, depth, scatter, read);
    }
}

static void backward_unit(const Call *call, Memory *part, int64_t unit) {
    int64_t depth = vectors(call->D), D = call->D, image = unit / call->M, head = unit % call->M;
    int scatter = call->output != NULL, read = call->grad_locations || call->grad_weights;
    if (read) load_maps(call, part, image, head);
    if (scatter) memset(part->grads, 0, (call->S + 1) * depth * sizeof(vec));
    if (scatter && read) backward_queries(call, part, image, head, 1, 1);
    else if (scatter) backward_queries(call, part, image, head, 1, 0);
    else backward_queries(call, part, image, head, 0, 1);
    for (int64_t s = 0; scatter && s < call->S; s++) {
        int64_t at = ((image * call->S + s) * call->M + head) * D;
        store(call->output, at, (REAL *)(part->grads + s * depth), D, (int)call->is_bfloat16);
    }
}

typedef struct {
    const Call *call;
    int64_t first, last, thread;
} Share;

static void *run_share(void *argument) {
    const Share *share = argument;
    Memory part = divide(share->call, share->call->memory + share->thread * share->call->per_thread);
    for (int64_t unit = share->first; unit < share->last; unit++)
        (share->call->is_backward ? backward_unit : forward_unit)(share->call, &part, unit);
    return NULL;
}

/* Run all units on `threads` threads, this one among them. They end with the call: a fork finds none. */
void run(const Call *call, int64_t threads) {
    int64_t units = call->B * call->M * call->parts;
    Share shares[threads];
    pthread_t others[threads];
    int started[threads];
    for (int64_t thread = threads - 1; thread >= 0; thread--) {
        Share share = {call, units * thread / threads, units * (thread + 1) / threads, thread};
        shares[thread] = share;
        started[thread] = thread && !pthread_create(&others[thread], NULL, run_share, &shares[thread]);
        if (!started[thread]) run_share(&shares[thread]);
    }
    for (int64_t thread = 1; thread < threads; thread++)
        if (started[thread]) pthread_join(others[thread], NULL);
}
