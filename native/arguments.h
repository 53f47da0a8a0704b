// Checked arguments: wrong ones throw TypeError or RangeError before any system call.
#pragma once

#include <arpa/inet.h>
#include <napi.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

struct Bytes {
	uint8_t* data;
	size_t size;
};

inline std::string TextArgument(const Napi::CallbackInfo& info, size_t index, const char* name) {
	if (!info[index].IsString()) {
		throw Napi::TypeError::New(info.Env(), std::string("Expected `") + name + "` to be a string");
	}
	return info[index].As<Napi::String>().Utf8Value();
}

inline Bytes BytesOf(Napi::Env env, Napi::Value value, const char* name) {
	if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array) {
		throw Napi::TypeError::New(env, std::string("Expected `") + name + "` to be a Uint8Array");
	}
	Napi::Uint8Array array = value.As<Napi::Uint8Array>();
	return {array.Data(), array.ByteLength()};
}

inline Bytes BytesArgument(const Napi::CallbackInfo& info, size_t index, const char* name) {
	return BytesOf(info.Env(), info[index], name);
}

inline Bytes BytesArgument(const Napi::CallbackInfo& info, size_t index, const char* name, size_t size) {
	Bytes bytes = BytesArgument(info, index, name);
	if (bytes.size != size) {
		throw Napi::RangeError::New(info.Env(), std::string("Expected `") + name + "` to have " + std::to_string(size) + " bytes, got " + std::to_string(bytes.size));
	}
	return bytes;
}

inline int64_t IntegerOf(Napi::Env env, Napi::Value value, const char* name, int64_t low, int64_t high) {
	if (!value.IsNumber()) {
		throw Napi::TypeError::New(env, std::string("Expected `") + name + "` to be a number");
	}
	double number = value.As<Napi::Number>().DoubleValue();
	if (number != std::floor(number) || number < static_cast<double>(low) || number > static_cast<double>(high)) {
		throw Napi::RangeError::New(env, std::string("Expected `") + name + "` to be an integer from " + std::to_string(low) + " to " + std::to_string(high));
	}
	return static_cast<int64_t>(number);
}

inline int64_t IntegerArgument(const Napi::CallbackInfo& info, size_t index, const char* name, int64_t low = INT32_MIN, int64_t high = UINT32_MAX) {
	return IntegerOf(info.Env(), info[index], name, low, high);
}

inline int64_t IntegerArgumentOr(const Napi::CallbackInfo& info, size_t index, const char* name, int64_t otherwise) {
	return info[index].IsUndefined() ? otherwise : IntegerArgument(info, index, name);
}

inline Napi::Object ObjectArgument(const Napi::CallbackInfo& info, size_t index, const char* name) {
	if (!info[index].IsObject()) {
		throw Napi::TypeError::New(info.Env(), std::string("Expected `") + name + "` to be an object");
	}
	return info[index].As<Napi::Object>();
}

inline int FdArgument(const Napi::CallbackInfo& info, size_t index, const char* name) {
	return static_cast<int>(IntegerArgument(info, index, name, 0, INT32_MAX));
}

inline Napi::Uint8Array CopyBytes(Napi::Env env, const void* data, size_t size) {
	Napi::Uint8Array copy = Napi::Uint8Array::New(env, size);
	if (size > 0) {
		memcpy(copy.Data(), data, size);
	}
	return copy;
}

/* An IPv4 or IPv6 address, network order. A copy: reading the next property of the same object may run JS that takes the bytes away. */
struct IpAddress {
	size_t size;
	uint8_t bytes[16];

	static IpAddress Of(Napi::Env env, Napi::Value value) {
		Bytes given = BytesOf(env, value, "address");
		if (given.size != 4 && given.size != 16) {
			throw Napi::RangeError::New(env, "Expected `address` to have 4 or 16 bytes, got " + std::to_string(given.size));
		}
		IpAddress address{given.size, {}};
		memcpy(address.bytes, given.data, given.size);
		return address;
	}

	uint8_t family() const { return size == 4 ? AF_INET : AF_INET6; }
	std::string Text() const {
		char text[INET6_ADDRSTRLEN] = "";
		return inet_ntop(family(), bytes, text, sizeof(text));
	}
};
