// Embeds one batch of random maps of the paper's MGN from C++: the C API from beginning to end, checked against loops.
//
//   nvcc -std=c++17 -arch=native -o example example.cu stripe_pool_reduce.cu && ./example

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "stripe_pool_reduce.h"

static void check_cuda(cudaError_t error) {
    if (error != cudaSuccess) std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error)), std::exit(1);
}

static void check(int status) {
    if (status != MGN_SPR_OK) std::fprintf(stderr, "stripe-pool-reduce: %s\n", mgn_spr_error(status)), std::exit(1);
}

static float* on_device(const std::vector<float>& numbers) {
    float* copy = nullptr;
    check_cuda(cudaMalloc(&copy, numbers.size() * sizeof(float)));
    check_cuda(cudaMemcpy(copy, numbers.data(), numbers.size() * sizeof(float), cudaMemcpyHostToDevice));
    return copy;
}

// The embedding of one image and its mirror, one number after another.
static std::vector<double> by_loops(const mgn_spr_problem& problem, const std::vector<std::vector<float>>& maps,
                                    const std::vector<float>& weight, const std::vector<float>& bias, int image) {
    std::vector<double> embedding;
    int feature = 0;
    for (int b = 0; b < problem.branches; ++b) {
        const int stripes = problem.stripes[b], height = problem.heights[b], width = problem.widths[b];
        for (int region = 0; region < (stripes == 1 ? 1 : 1 + stripes); ++region, ++feature) {
            const int first = region ? (region - 1) * height / stripes : 0;
            const int last = region ? (region * height + stripes - 1) / stripes : height;
            std::vector<double> sum(problem.reduced, 0.0);
            for (int row : {image, image + problem.batch / 2}) {
                std::vector<float> pooled(problem.channels);
                for (int c = 0; c < problem.channels; ++c) {
                    const float* plane = &maps[b][(size_t(row) * problem.channels + c) * height * width];
                    pooled[c] = plane[first * width];
                    for (int i = first * width; i < last * width; ++i) pooled[c] = std::fmax(pooled[c], plane[i]);
                }
                for (int r = 0; r < problem.reduced; ++r) {
                    const size_t at = size_t(feature) * problem.reduced + r;
                    double value = bias[at];
                    const float* row_of_weight = &weight[at * problem.channels];
                    for (int c = 0; c < problem.channels; ++c) value += double(pooled[c]) * row_of_weight[c];
                    sum[r] += std::fmax(value, 0.0) / 2;
                }
            }
            embedding.insert(embedding.end(), sum.begin(), sum.end());
        }
    }
    double squares = 0;
    for (double value : embedding) squares += value * value;
    for (double& value : embedding) value /= std::sqrt(squares);
    return embedding;
}

int main() {
    mgn_spr_problem problem = {};
    problem.dtype = MGN_SPR_FLOAT32;
    problem.layout = MGN_SPR_NCHW;
    problem.output = MGN_SPR_MIRROR_EMBEDDINGS;
    problem.batch = 4;  // two images, then their mirrors
    problem.channels = 2048;
    problem.reduced = 256;
    problem.branches = 3;
    const int stripes[] = {1, 2, 3}, heights[] = {12, 24, 24}, widths[] = {4, 8, 8};
    for (int b = 0; b < 3; ++b) {
        problem.stripes[b] = stripes[b], problem.heights[b] = heights[b], problem.widths[b] = widths[b];
    }
    const int features = 1 + 3 + 4, dim = features * problem.reduced;

    std::mt19937 generator(0);
    std::normal_distribution<float> normal;
    const auto random = [&](size_t count) {
        std::vector<float> numbers(count);
        for (float& number : numbers) number = normal(generator);
        return numbers;
    };
    std::vector<std::vector<float>> maps;
    const size_t planes = size_t(problem.batch) * problem.channels;
    for (int b = 0; b < 3; ++b) maps.push_back(random(planes * heights[b] * widths[b]));
    const std::vector<float> weight = random(size_t(dim) * problem.channels), bias = random(dim);

    mgn_spr_plan plan;
    check(mgn_spr_plan_for(&problem, &plan));

    mgn_spr_pointers pointers = {};
    for (int b = 0; b < 3; ++b) pointers.maps[b] = on_device(maps[b]);
    pointers.weight = on_device(weight);
    pointers.bias = on_device(bias);
    check_cuda(cudaMalloc(&pointers.workspace, plan.workspace_bytes));
    check_cuda(cudaMemset(pointers.workspace, 0, MGN_SPR_BARRIER_BYTES));
    check_cuda(cudaMalloc(&pointers.output, size_t(2) * dim * sizeof(float)));

    cudaStream_t stream;
    check_cuda(cudaStreamCreate(&stream));
    check(mgn_spr_launch(&problem, &plan, &pointers, stream));
    check_cuda(cudaStreamSynchronize(stream));
    std::vector<float> found(2 * dim);
    check_cuda(cudaMemcpy(found.data(), pointers.output, found.size() * sizeof(float), cudaMemcpyDeviceToHost));

    double worst = 0;
    for (int image = 0; image < 2; ++image) {
        const std::vector<double> expected = by_loops(problem, maps, weight, bias, image);
        for (int i = 0; i < dim; ++i) {
            const double error = std::fabs(found[image * dim + i] - expected[i]);
            worst = error <= worst ? worst : error;  // NaN is the worst
        }
    }
    for (const void* map : pointers.maps) check_cuda(cudaFree(const_cast<void*>(map)));
    check_cuda(cudaFree(const_cast<void*>(pointers.weight)));
    check_cuda(cudaFree(const_cast<float*>(pointers.bias)));
    check_cuda(cudaFree(pointers.workspace));
    check_cuda(cudaFree(pointers.output));
    check_cuda(cudaStreamDestroy(stream));
    std::printf("path %d, largest error of 2 x %d unit embeddings: %.2g\n", plan.path, dim, worst);
    return worst < 1e-6 ? 0 : 1;
}
