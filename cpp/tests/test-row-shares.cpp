// Which products are computed together (one-token.h), and that every row of them is taken by one thread, however fast
// each is, and not too many at a time (row-shares.h). Exit code 0: so it was.

#include "row-shares.h"

#include "ggml-alloc.h"
#include "ggml-cpp.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "one-token.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

static constexpr int N_ROUNDS = 40;
static constexpr int N_GROUP  = 8; // rows

struct test_case {
    int                  n_threads;
    std::vector<int64_t> n_groups; // of each product
    size_t               row_bytes;
};

static int64_t sum(const std::vector<int64_t> & n_groups) {
    return std::accumulate(n_groups.begin(), n_groups.end(), (int64_t) 0);
}

// The most that one thread takes at once of its share: half of it, three quarters of what is left, or the smallest
// step.
static int64_t most_groups(const test_case & t) {
    const int64_t share = t.n_threads == 1 ? 2 * sum(t.n_groups) : sum(t.n_groups) / t.n_threads + 1;
    return std::max<int64_t>((share + 1) / 2, MELT_MIN_STEP / (N_GROUP * t.row_bytes));
}

// The products of one test: nothing but their shapes.
struct test_products {
    ggml_tensor              weights = {};
    std::vector<ggml_tensor> nodes;
    melt_products            products = {};

    test_products(const test_case & t) : nodes(t.n_groups.size()) {
        weights.nb[1] = t.row_bytes;
        products.n    = (int) nodes.size();
        for (int i = 0; i < products.n; i++) {
            nodes[i].ne[0]   = t.n_groups[i] * N_GROUP;
            nodes[i].src[0]  = &weights;
            products.node[i] = &nodes[i];
        }
    }
};

// One thread's work. taken: how often each group of each product was taken.
static void take(const ggml_compute_params & params, const test_case & t,
                 std::vector<std::vector<std::atomic<int>>> & taken, std::atomic<bool> & wrong) {
    for (melt_rows rows = {};;) {
        const bool takes = rows.group == rows.end_group; // or goes on with what it has
        if (!melt_next_rows(&params, N_GROUP, &rows)) {
            return;
        }
        const int64_t n      = (rows.end - rows.first) / N_GROUP;
        const int64_t n_most = takes ? most_groups(t) - (rows.end_group - rows.group) : n;
        if (rows.product < 0 || rows.product >= params.melt->n || rows.first < 0 || rows.first % N_GROUP != 0 ||
            rows.end % N_GROUP != 0 || n <= 0 || n > n_most || rows.end > params.melt->node[rows.product]->ne[0]) {
            wrong = true;
            return;
        }
        for (int64_t i = rows.first / N_GROUP; i < rows.end / N_GROUP; i++) {
            taken[rows.product][i]++;
        }
    }
}

// at_once: or each thread when the one before is done, so that the first takes all but the last steps.
static bool passes(const test_case & t, bool at_once) {
    const test_products      products(t);
    std::vector<char>        work(melt_row_shares_bytes(t.n_threads));
    std::atomic<bool>        wrong{false};
    std::atomic<int>         n_ready{0};
    std::vector<std::thread> threads;

    std::vector<std::vector<std::atomic<int>>> taken;
    for (const int64_t n : t.n_groups) {
        taken.emplace_back(n);
    }
    for (int ith = 0; ith < t.n_threads; ith++) {
        ggml_compute_params params = {};
        params.ith                 = ith;
        params.nth                 = t.n_threads;
        params.wsize               = work.size();
        params.wdata               = work.data(); // of zeros: nothing is taken
        params.melt                = &products.products;
        threads.emplace_back([&, params] {
            n_ready++;
            while (at_once && n_ready < t.n_threads) {
                std::this_thread::yield();
            }
            take(params, t, taken, wrong);
        });
        if (!at_once) {
            threads.back().join();
        }
    }
    for (std::thread & thread : threads) {
        if (thread.joinable()) {
            thread.join();
        }
    }
    return !wrong && std::all_of(taken.begin(), taken.end(), [](const auto & product) {
        return std::all_of(product.begin(), product.end(), [](const auto & n) { return n == 1; });
    });
}

// A graph of products whose weights are repacked.
struct test_graph {
    ggml_context_ptr        weights{ggml_init({1 << 20, nullptr, true})};
    ggml_context_ptr        values{ggml_init({1 << 20, nullptr, false})};
    ggml_backend_buffer_ptr buffer;
    ggml_cgraph *           graph = ggml_new_graph(values.get());

    ggml_tensor * matrix(int64_t n, ggml_type type = GGML_TYPE_Q4_0) {
        return ggml_new_tensor_2d(weights.get(), type, n, 64);
    }
    ggml_tensor * vector(int64_t n) { return ggml_new_tensor_1d(values.get(), GGML_TYPE_F32, n); }
    ggml_tensor * add(ggml_tensor * node) {
        ggml_build_forward_expand(graph, node);
        return node;
    }
    ggml_tensor * product(ggml_tensor * w, ggml_tensor * x) { return add(ggml_mul_mat(values.get(), w, x)); }

    // how many are computed together with the node of that number
    int gathered(ggml_backend_buffer_type_t repack, int i_node) {
        if (!buffer) {
            buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(weights.get(), repack));
        }
        melt_products products;
        const int     n_more = melt_gather_products(graph, i_node, &products);
        const bool    ok     = products.n == 0 ? n_more == 0 : products.node[0] == graph->nodes[i_node];
        return ok ? products.n : -1;
    }
};

// ggml's buffer of repacked weights; none on a CPU for which it repacks no q4_0.
static ggml_backend_buffer_type_t repack_buffer_type() {
    if (!ggml_cpu_has_avx2() && !(ggml_cpu_has_neon() && ggml_cpu_has_dotprod())) {
        return nullptr;
    }
    ggml_backend_dev_t dev = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
    const auto         get = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
        ggml_backend_cpu_reg(), "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * buft = get(dev); buft != nullptr && *buft != nullptr; buft++) {
        if (strcmp(ggml_backend_buft_name(*buft), "CPU_REPACK") == 0) {
            return *buft;
        }
    }
    return nullptr;
}

static int n_failed = 0;

static void expect(const char * what, int found, int expected) {
    if (found != expected) {
        printf("%s: %d products together, expected %d: FAILED\n", what, found, expected);
        n_failed++;
    }
}

static void test_gathering(ggml_backend_buffer_type_t repack) {
    {
        test_graph    g;
        ggml_tensor * u = g.vector(256);
        ggml_tensor * h = g.vector(256);
        ggml_tensor * q = g.product(g.matrix(256), u);
        g.add(ggml_reshape_2d(g.values.get(), q, 8, 8)); // a view in between
        g.product(g.matrix(256), u);
        g.product(g.matrix(256), h);
        g.product(g.matrix(256), u);
        g.product(g.matrix(256), g.vector(256)); // the third vector
        expect("two vectors", g.gathered(repack, 0), 4);
        expect("from the last of them on", g.gathered(repack, 4), 2);
        expect("a view", g.gathered(repack, 1), 0);
    }
    {
        test_graph    g;
        ggml_tensor * u = g.vector(64);
        for (int i = 0; i < MELT_MAX_PRODUCTS + 1; i++) {
            g.product(g.matrix(64), u);
        }
        expect("many", g.gathered(repack, 0), MELT_MAX_PRODUCTS);
        expect("the last one", g.gathered(repack, MELT_MAX_PRODUCTS), 1);
    }
    {
        test_graph    g;
        ggml_tensor * u = g.vector(256);
        ggml_tensor * x = g.product(g.matrix(256), u);
        ggml_tensor * y = g.product(g.matrix(256), u);
        g.product(g.matrix(32), g.add(ggml_view_1d(g.values.get(), y, 32, 128)));
        g.product(g.matrix(64), x);
        g.product(g.matrix(64), g.product(g.matrix(64), x));
        expect("another length", g.gathered(repack, 0), 2);
        expect("one that takes what another gives", g.gathered(repack, 4), 2);
    }
    {
        test_graph    g;
        ggml_tensor * u = g.vector(256);
        g.product(g.matrix(256), u);
        g.product(g.matrix(256, GGML_TYPE_Q4_K), u);
        g.product(g.matrix(256), ggml_new_tensor_2d(g.values.get(), GGML_TYPE_F32, 256, 2));
        g.add(ggml_sqr(g.values.get(), u));
        expect("another type", g.gathered(repack, 0), 1);
        expect("two tokens", g.gathered(repack, 2), 0);
        expect("no product", g.gathered(repack, 3), 0);
    }
}

int main() {
    const std::vector<std::vector<int64_t>> products = {
        {0}, {1}, {2}, {3}, {64}, {301}, {1, 1}, {64, 16, 16}, {704, 704}, {5, 0, 7}, {1, 2, 3, 4, 5, 6, 7, 8},
    };
    for (const int n_threads : {1, 2, 3, 5, 9}) {
        for (const std::vector<int64_t> & n_groups : products) {
            for (const size_t row_bytes : {1, 1152, 3168, 12500}) {
                const test_case t  = {n_threads, n_groups, row_bytes};
                bool            ok = passes(t, false);
                for (int i = 0; i < N_ROUNDS && ok; i++) {
                    ok = passes(t, true);
                }
                if (!ok) {
                    printf("%d threads, %zu products, %lld groups of %zu bytes a row: FAILED\n", n_threads,
                           n_groups.size(), (long long) sum(n_groups), row_bytes);
                    n_failed++;
                }
            }
        }
    }
    if (const ggml_backend_buffer_type_t repack = repack_buffer_type()) {
        test_gathering(repack);
    }
    return n_failed == 0 ? 0 : 1;
}
