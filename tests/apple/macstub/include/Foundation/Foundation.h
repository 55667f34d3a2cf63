/* The part of Foundation that a client of private classes can want, as developer.apple.com/documentation/foundation
 * declares it: enough to compile for macOS, and nothing that is not listed here compiles. */
#ifndef ANELLM_STUB_FOUNDATION_H
#define ANELLM_STUB_FOUNDATION_H

#include <CoreFoundation/CoreFoundation.h>
#include <objc/NSObjCRuntime.h>
#include <objc/objc.h>

@class NSArray<T>, NSData, NSDictionary<K, V>, NSError, NSNumber, NSString, NSURL;

typedef double NSTimeInterval;
typedef NSUInteger NSStringEncoding;
typedef struct _NSZone NSZone;
enum { NSUTF8StringEncoding = 4 };
enum { NSDataWritingAtomic = 1 };
typedef NSUInteger NSDataWritingOptions;

#if __has_feature(objc_arc)
#define STUB_MANUAL(declaration)
#else
#define STUB_MANUAL(declaration) declaration
#endif

@protocol NSObject
- (BOOL)isEqual:(id)other;
- (NSUInteger)hash;
- (Class)class;
- (BOOL)isKindOfClass:(Class)cls;
- (BOOL)isMemberOfClass:(Class)cls;
- (BOOL)respondsToSelector:(SEL)selector;
- (NSString *)description;
STUB_MANUAL(-(instancetype)retain;)
STUB_MANUAL(-(oneway void)release;)
STUB_MANUAL(-(instancetype)autorelease;)
STUB_MANUAL(-(NSUInteger)retainCount;)
@end

@protocol NSCopying
- (id)copyWithZone:(NSZone *)zone;
@end

typedef struct {
    unsigned long state;
    id __unsafe_unretained *itemsPtr;
    unsigned long *mutationsPtr;
    unsigned long extra[5];
} NSFastEnumerationState;

@protocol NSFastEnumeration
- (NSUInteger)countByEnumeratingWithState:(NSFastEnumerationState *)state
                                  objects:(id __unsafe_unretained[])buffer
                                    count:(NSUInteger)n;
@end

__attribute__((objc_root_class))
@interface NSObject <NSObject> {
    Class isa;
}
+ (instancetype)alloc;
+ (instancetype)new;
+ (Class)class;
+ (BOOL)instancesRespondToSelector:(SEL)selector;
- (instancetype)init;
- (void)dealloc;
- (id)copy;
- (id)mutableCopy;
@end

#if !__has_feature(objc_arc)
@interface NSAutoreleasePool : NSObject
- (void)drain;
@end
#endif

@interface NSNull : NSObject
+ (NSNull *)null;
@end

@interface NSException : NSObject
- (NSString *)name;
- (NSString *)reason;
@end

@interface NSNumber : NSObject <NSCopying>
+ (NSNumber *)numberWithBool:(BOOL)value;
+ (NSNumber *)numberWithChar:(char)value;
+ (NSNumber *)numberWithDouble:(double)value;
+ (NSNumber *)numberWithFloat:(float)value;
+ (NSNumber *)numberWithInt:(int)value;
+ (NSNumber *)numberWithInteger:(NSInteger)value;
+ (NSNumber *)numberWithLong:(long)value;
+ (NSNumber *)numberWithLongLong:(long long)value;
+ (NSNumber *)numberWithUnsignedInt:(unsigned int)value;
+ (NSNumber *)numberWithUnsignedInteger:(NSUInteger)value;
+ (NSNumber *)numberWithUnsignedLong:(unsigned long)value;
+ (NSNumber *)numberWithUnsignedLongLong:(unsigned long long)value;
- (BOOL)boolValue;
- (int)intValue;
- (NSInteger)integerValue;
- (long long)longLongValue;
- (unsigned int)unsignedIntValue;
- (NSUInteger)unsignedIntegerValue;
- (unsigned long long)unsignedLongLongValue;
- (double)doubleValue;
@end

@interface NSString : NSObject <NSCopying>
+ (instancetype)string;
+ (instancetype)stringWithUTF8String:(const char *)text;
+ (instancetype)stringWithFormat:(NSString *)format, ... __attribute__((format(__NSString__, 1, 2)));
- (instancetype)initWithUTF8String:(const char *)text;
- (instancetype)initWithBytes:(const void *)bytes length:(NSUInteger)n encoding:(NSStringEncoding)encoding;
- (NSUInteger)length;
- (const char *)UTF8String;
- (const char *)fileSystemRepresentation;
- (BOOL)isEqualToString:(NSString *)other;
- (BOOL)hasPrefix:(NSString *)prefix;
- (BOOL)hasSuffix:(NSString *)suffix;
- (NSString *)substringFromIndex:(NSUInteger)index;
- (NSString *)substringToIndex:(NSUInteger)index;
- (NSString *)lastPathComponent;
- (NSString *)stringByAppendingString:(NSString *)other;
- (NSString *)stringByAppendingPathComponent:(NSString *)name;
- (NSString *)stringByDeletingLastPathComponent;
- (NSData *)dataUsingEncoding:(NSStringEncoding)encoding;
- (BOOL)writeToFile:(NSString *)path
         atomically:(BOOL)atomically
           encoding:(NSStringEncoding)encoding
              error:(NSError **)error;
@end

@interface NSMutableString : NSString
- (void)appendFormat:(NSString *)format, ... __attribute__((format(__NSString__, 1, 2)));
- (void)appendString:(NSString *)other;
@end

@interface NSData : NSObject <NSCopying>
+ (instancetype)data;
+ (instancetype)dataWithBytes:(const void *)bytes length:(NSUInteger)n;
+ (instancetype)dataWithBytesNoCopy:(void *)bytes length:(NSUInteger)n freeWhenDone:(BOOL)owned;
+ (instancetype)dataWithContentsOfFile:(NSString *)path;
- (instancetype)initWithBytes:(const void *)bytes length:(NSUInteger)n;
- (instancetype)initWithBytesNoCopy:(void *)bytes length:(NSUInteger)n freeWhenDone:(BOOL)owned;
- (NSUInteger)length;
- (const void *)bytes;
- (BOOL)writeToFile:(NSString *)path atomically:(BOOL)atomically;
- (BOOL)writeToFile:(NSString *)path options:(NSDataWritingOptions)options error:(NSError **)error;
@end

@interface NSMutableData : NSData
+ (instancetype)dataWithLength:(NSUInteger)n;
- (void *)mutableBytes;
@end

@interface NSArray<__covariant T> : NSObject <NSCopying, NSFastEnumeration>
+ (instancetype)array;
+ (instancetype)arrayWithObject:(T)object;
+ (instancetype)arrayWithObjects:(const T __unsafe_unretained[])objects count:(NSUInteger)n;
- (instancetype)initWithObjects:(const T __unsafe_unretained[])objects count:(NSUInteger)n;
- (NSUInteger)count;
- (T)objectAtIndex:(NSUInteger)index;
- (T)lastObject;
- (BOOL)containsObject:(id)object;
@end

@interface NSMutableArray<T> : NSArray <T>
+ (instancetype)arrayWithCapacity:(NSUInteger)n;
- (instancetype)initWithCapacity:(NSUInteger)n;
- (void)addObject:(T)object;
@end

@interface NSDictionary<__covariant K, __covariant V> : NSObject <NSCopying, NSFastEnumeration>
+ (instancetype)dictionary;
+ (instancetype)dictionaryWithObject:(V)object forKey:(K<NSCopying>)key;
+ (instancetype)dictionaryWithObjects:(const V __unsafe_unretained[])objects
                              forKeys:(const K<NSCopying> __unsafe_unretained[])keys
                                count:(NSUInteger)n;
- (NSUInteger)count;
- (V)objectForKey:(K)key;
- (NSArray<K> *)allKeys;
- (NSArray<V> *)allValues;
@end

@interface NSMutableDictionary<K, V> : NSDictionary <K, V>
+ (instancetype)dictionaryWithCapacity:(NSUInteger)n;
- (instancetype)initWithCapacity:(NSUInteger)n;
- (void)setObject:(V)object forKey:(K<NSCopying>)key;
@end

@interface NSError : NSObject <NSCopying>
- (NSString *)domain;
- (NSInteger)code;
- (NSDictionary *)userInfo;
- (NSString *)localizedDescription;
- (NSString *)localizedFailureReason;
@end

@interface NSURL : NSObject <NSCopying>
+ (NSURL *)fileURLWithPath:(NSString *)path;
+ (NSURL *)fileURLWithPath:(NSString *)path isDirectory:(BOOL)directory;
- (NSString *)path;
@end

@interface NSFileManager : NSObject
+ (NSFileManager *)defaultManager;
- (BOOL)createDirectoryAtPath:(NSString *)path
    withIntermediateDirectories:(BOOL)parents
                     attributes:(NSDictionary *)attributes
                          error:(NSError **)error;
- (BOOL)fileExistsAtPath:(NSString *)path;
- (BOOL)removeItemAtPath:(NSString *)path error:(NSError **)error;
- (BOOL)createFileAtPath:(NSString *)path contents:(NSData *)contents attributes:(NSDictionary *)attributes;
@end

@interface NSBundle : NSObject
+ (NSBundle *)bundleWithPath:(NSString *)path;
- (BOOL)load;
@end

typedef struct {
    NSInteger majorVersion, minorVersion, patchVersion;
} NSOperatingSystemVersion;

typedef NSInteger NSProcessInfoThermalState;
enum {
    NSProcessInfoThermalStateNominal,
    NSProcessInfoThermalStateFair,
    NSProcessInfoThermalStateSerious,
    NSProcessInfoThermalStateCritical
};

@interface NSProcessInfo : NSObject
+ (NSProcessInfo *)processInfo;
- (NSOperatingSystemVersion)operatingSystemVersion;
- (BOOL)isOperatingSystemAtLeastVersion:(NSOperatingSystemVersion)version;
- (NSString *)operatingSystemVersionString;
- (NSString *)globallyUniqueString;
- (int)processIdentifier;
- (NSProcessInfoThermalState)thermalState;
- (BOOL)isLowPowerModeEnabled;
@end

extern Class NSClassFromString(NSString *name);
extern NSString *NSTemporaryDirectory(void);

#endif
